// Behaviour of the report page. Everything readable is in the HTML already, except the rollout viewer; this adds
// reading values off the curves, hiding methods, the theme switch and the viewer. Text from models is only ever
// assigned to textContent, and nothing is fetched. The page joins base.js, curves.js, viewer.js and start.js, in this
// order, inside one strict function.
const THEMES = ["auto", "light", "dark"];
const SVG = "http://www.w3.org/2000/svg";

// ---- small helpers ---------------------------------------------------------------------------------------------
const byId = (id) => document.getElementById(id);
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class") node.className = value;
    else if (name.includes("-") || name === "role") node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children);
  return node;
}

function shape(tag, attributes = {}) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

function show(value, format, digits = 4) {
  if (value === null || value === undefined) return "–";
  if (format === "percent") return `${(100 * value).toFixed(1).replace(/^-0\.0$/, "0.0")}%`;
  if (value !== 0 && Math.abs(value) < 1e-3) return value.toExponential(2);
  return (Number(value.toPrecision(digits)) + 0).toLocaleString("en-US", { maximumFractionDigits: 10 });
}

// Control, zero-width and direction-changing characters and lone surrogates are named instead of being obeyed.
function visible(text) {
  const name = (c) => `⟨U+${c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`;
  return text
    .replace(/[\u0000-\u0008\u000b-\u001f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)))
    .replace(/[\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g, name)
    .replace(/\p{Surrogate}/gu, name);
}

// A token on its own, where white space would not be seen.
function tokenName(text) {
  const spaces = (run) => "␣".repeat(run.length);
  return visible(text).replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/^ +| +$/g, spaces) || "(empty)";
}

// The index of the entry of a sorted list that is nearest to `target`.
function nearest(sorted, target) {
  let low = 0;
  let high = sorted.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < target) low = middle + 1;
    else high = middle;
  }
  return low > 0 && target - sorted[low - 1] <= sorted[low] - target ? low - 1 : low;
}

// ---- theme -----------------------------------------------------------------------------------------------------
// Storage is refused to files opened from disk in some browsers; the switch then lasts as long as the page.
function stored(value) {
  try {
    if (value === undefined) return localStorage.getItem("trb-theme");
    localStorage.setItem("trb-theme", value);
  } catch { /* no storage */ }
  return value ?? null;
}

function applyTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
}

function themeSwitch() {
  const button = byId("theme");
  let current = THEMES.includes(stored()) ? stored() : "auto";
  const label = () => {
    button.textContent = `Theme: ${current}`;
  };
  button.addEventListener("click", () => {
    current = THEMES[(THEMES.indexOf(current) + 1) % THEMES.length];
    applyTheme(current);
    stored(current);
    label();
  });
  label();
  button.hidden = false;
}
