// Light or dark as the reader's system is, and as it changes. (Material's own palette remembers the first visit.)
const dark = matchMedia("(prefers-color-scheme: dark)");
const follow = () => {
  document.body.dataset.mdColorScheme = dark.matches ? "slate" : "default";
  document.body.dataset.mdColorPrimary = dark.matches ? "black" : "white";
};
dark.addEventListener("change", follow);
follow();
