// Steps through the stages: arrow keys, Home and End, the space bar, the buttons, the numbers; the address follows.
(() => {
  "use strict";
  const stages = [...document.querySelectorAll(".stage")];
  const links = [...document.querySelectorAll(".steps a")];
  const [back, next] = ["back", "next"].map((id) => document.getElementById(id));
  let current = -1;
  const go = (index, remember = true) => {
    const wanted = Math.max(0, Math.min(stages.length - 1, index));
    if (wanted === current) return;
    current = wanted;
    stages.forEach((stage, i) => stage.classList.toggle("current", i === current));
    links.forEach((link, i) => {
      link.classList.toggle("done", i < current);
      i === current ? link.setAttribute("aria-current", "step") : link.removeAttribute("aria-current");
    });
    back.disabled = current === 0;
    next.disabled = current === stages.length - 1;
    if (remember) history.replaceState(null, "", "#" + stages[current].id);
    scrollTo(0, 0);
  };
  const fromAddress = () => go(Math.max(0, stages.findIndex((stage) => "#" + stage.id === location.hash)), false);
  const moves = {
    ArrowRight: () => current + 1, ArrowLeft: () => current - 1, PageDown: () => current + 1,
    PageUp: () => current - 1, Home: () => 0, End: () => stages.length - 1,
  };
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const onButton = event.target.closest?.("button, a");
    if (event.key === " " && !onButton) go(current + (event.shiftKey ? -1 : 1));
    else if (moves[event.key]) go(moves[event.key]());
    else return;
    event.preventDefault();
  });
  back.addEventListener("click", () => go(current - 1));
  next.addEventListener("click", () => go(current + 1));
  links.forEach((link, i) => link.addEventListener("click", (event) => { event.preventDefault(); go(i); }));
  addEventListener("hashchange", fromAddress);
  document.documentElement.classList.add("stepping");
  fromAddress();
})();
