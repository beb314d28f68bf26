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
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => (one.open = true)));
});
