// ---- start -----------------------------------------------------------------------------------------------------
applyTheme(THEMES.includes(stored()) ? stored() : "auto");
document.addEventListener("DOMContentLoaded", () => {
  const data = JSON.parse(byId("data").textContent);
  themeSwitch();
  let rollouts = null;
  const charts = [...document.querySelectorAll("section.curves")].flatMap((section) =>
    curves(section, data, (axis, step) => rollouts?.goTo(axis, step)));
  const pin = (axis, step) => charts.forEach((one) => one.pin(one.axis === axis ? step : null));
  rollouts = byId("viewer") ? viewer(byId("viewer"), data, pin) : null;
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[data-match]");
    if (link) rollouts?.compare(link.dataset.match, Number(link.dataset.model));
  });
  // What is as by default would fill pages.
  const folded = () => document.querySelectorAll("details:not(.defaults)");
  addEventListener("beforeprint", () => folded().forEach((one) => (one.open = true)));
});
