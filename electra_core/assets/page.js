// What a page does under the pointer: values of a chart's curves, and each token's probability.
(() => {
  "use strict";
  const format = (value) => (Math.abs(value) >= 1000 ? value.toLocaleString("en") : Number(value.toPrecision(4)).toString());
  const element = (tag, cls, parent) => {
    const made = document.createElement(tag);
    made.className = cls;
    parent.append(made);
    return made;
  };

  for (const plot of document.querySelectorAll("[data-chart]")) {
    const chart = JSON.parse(plot.dataset.chart);
    const [low, high] = chart.x;
    const all = [...new Set(chart.series.flatMap((s) => s.x))].sort((a, b) => a - b);
    let cursor, tip;
    const hide = () => { cursor?.remove(); tip?.remove(); cursor = tip = undefined; };
    plot.addEventListener("pointerleave", hide);
    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect();
      const at = low + ((event.clientX - box.left) / box.width) * (high - low);
      const nearest = all.reduce((best, x) => (Math.abs(x - at) < Math.abs(best - at) ? x : best), all[0]);
      if (nearest === undefined) return;
      cursor ??= element("div", "cursor", plot);
      tip ??= element("div", "tip", plot);
      const left = (100 * (nearest - low)) / (high - low);
      cursor.style.left = left + "%";
      tip.style.left = left > 50 ? "auto" : `calc(${left}% + 10px)`;
      tip.style.right = left > 50 ? `calc(${100 - left}% + 10px)` : "auto";
      tip.replaceChildren(document.createTextNode(`${chart.xLabel} ${format(nearest)}`));
      for (const s of chart.series) {
        const value = s.y[s.x.indexOf(nearest)];
        if (value === null || value === undefined) continue;
        const row = element("div", "tone" + s.tone, tip);
        element("i", "", row);
        row.append(`${s.name}  ${format(value)}`);
      }
    });
  }

  let floating;
  const describe = (token) => {
    const p = (100 * token.dataset.p).toFixed(1);
    const was = token.dataset.was;
    return `${p}% replaced` + (was === undefined ? "" : ` · was “${was}”`);
  };
  const show = (event) => {
    const token = event.target.closest?.(".tok[data-p]");
    floating?.remove();
    floating = undefined;
    if (!token) return;
    floating = element("div", "floating", document.body);
    floating.textContent = describe(token);
    const box = token.getBoundingClientRect();
    const room = document.documentElement.clientWidth - floating.offsetWidth - 8;
    floating.style.left = Math.max(8, Math.min(room, box.left)) + scrollX + "px";
    floating.style.top = box.bottom + scrollY + 7 + "px";
  };
  document.addEventListener("pointerover", show);
  document.addEventListener("focusin", show);
})();
