// Behaviour of the report page. Everything readable is in the HTML already, except the rollout viewer; this adds
// reading values off the curves, hiding methods, the theme switch and the viewer. Text from models is only ever
// assigned to textContent, and nothing is fetched.
(() => {
  "use strict";
  const THEMES = ["auto", "light", "dark"];
  const SVG = "http://www.w3.org/2000/svg";

  // ---- small helpers -------------------------------------------------------------------------------------------
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
    if (format === "percent") return `${(100 * value).toFixed(1)}%`;
    if (value !== 0 && Math.abs(value) < 1e-3) return value.toExponential(2);
    return Number(value.toPrecision(digits)).toLocaleString("en-US", { maximumFractionDigits: 10 });
  }

  // Control, zero-width and direction-changing characters and lone surrogates are named instead of being obeyed.
  function visible(text) {
    const name = (c) => `⟨U+${c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`;
    return text
      .replace(/[\u0000-\u0008\u000b-\u001f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)))
      .replace(/[\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g, name)
      .replace(/\p{Surrogate}/gu, name);
  }

  // ---- theme ---------------------------------------------------------------------------------------------------
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

  // ---- curves --------------------------------------------------------------------------------------------------
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

  function chart(data, plot, methods, hidden) {
    const figure = byId(`figure-${data.id}`);
    const svg = figure.querySelector("svg");
    const cursor = shape("g", { class: "cursor", hidden: "" });
    const rule = shape("line", { y1: plot.top, y2: plot.height - plot.bottom });
    cursor.append(rule);
    const dots = data.series.map((series) => {
      const dot = shape("circle", { r: 3.4, class: `s${methods.get(series.method).style}` });
      cursor.append(dot);
      return dot;
    });
    svg.append(cursor);
    const tip = element("div", { class: "tip", hidden: true });
    figure.append(tip);

    const [x0, x1] = data.x;
    const [y0, y1] = data.y;
    const left = plot.left;
    const width = plot.width - plot.left - plot.right;
    const height = plot.height - plot.top - plot.bottom;
    const px = (x) => left + ((x - x0) / (x1 - x0)) * width;
    const py = (y) => plot.height - plot.bottom - ((y - y0) / (y1 - y0)) * height;
    const shown = () => data.series.filter((series) => !hidden.has(series.method));
    // A thinned curve has no point at every step: the nearest one within this distance stands for it.
    const tolerance = (x1 - x0) / 150;

    function at(series, step) {
      const index = nearest(series.x, step);
      return Math.abs(series.x[index] - step) <= tolerance ? index : -1;
    }

    function steps() {
      return [...new Set(shown().flatMap((series) => series.x))].sort((a, b) => a - b);
    }

    function describe(step) {
      return shown().map((series) => {
        const i = at(series, step);
        const method = methods.get(series.method);
        const value = i < 0 ? null : series.y[i];
        const line = { label: method.label, style: method.style, value: show(value, data.format), extra: [] };
        if (value !== null && series.low && series.low[i] !== null && series.high[i] !== null) {
          line.extra.push(["95% interval", `${show(series.low[i], data.format)} to ${show(series.high[i], data.format)}`]);
        }
        if (value !== null && series.bound) line.extra.push([data.boundName, show(series.bound[i], data.format)]);
        return line;
      });
    }

    return {
      figure, svg, steps,
      stepAt(clientX) {
        const box = svg.getBoundingClientRect();
        const units = ((clientX - box.left) / box.width) * plot.width;
        const known = steps();
        return known.length ? known[nearest(known, x0 + ((units - left) / width) * (x1 - x0))] : null;
      },
      sentence(step) {
        const parts = describe(step).map((line) => [line.label, line.value, ...line.extra.flat()].join(" "));
        return `${data.title}, step ${step}: ${parts.join("; ")}`;
      },
      mark(step) {
        cursor.removeAttribute("hidden");
        cursor.toggleAttribute("hidden", step < x0 || step > x1);
        rule.setAttribute("x1", px(step));
        rule.setAttribute("x2", px(step));
        data.series.forEach((series, k) => {
          const i = hidden.has(series.method) ? -1 : at(series, step);
          const known = i >= 0 && series.y[i] !== null;
          dots[k].toggleAttribute("hidden", !known);
          if (!known) return;
          dots[k].setAttribute("cx", px(series.x[i]));
          dots[k].setAttribute("cy", py(series.y[i]));
        });
      },
      tell(step) {
        const lines = describe(step).flatMap((line) => [
          element("div", { class: `s${line.style}` }, element("i"), line.label, element("b", {}, line.value)),
          ...line.extra.map(([name, value]) => element("div", { class: "minor" }, name, element("b", {}, value))),
        ]);
        tip.replaceChildren(element("div", { class: "when" }, `step ${step}`), ...lines);
        tip.hidden = false;
        const place = (px(step) / plot.width) * svg.clientWidth;
        const beside = place + 14 + tip.offsetWidth <= svg.clientWidth ? place + 14 : place - 14 - tip.offsetWidth;
        tip.style.left = `${clamp(beside, 0, Math.max(0, svg.clientWidth - tip.offsetWidth))}px`;
        tip.style.top = `${figure.querySelector("figcaption").offsetHeight + 4}px`;
      },
      clear() {
        cursor.setAttribute("hidden", "");
        tip.hidden = true;
      },
    };
  }

  function curves(data) {
    const section = byId("curves");
    if (!section) return;
    const methods = new Map(data.methods.map((method) => [method.name, method]));
    const hidden = new Set();
    const charts = data.charts.map((one) => chart(one, data.plot, methods, hidden));
    const reading = byId("reading");
    let current = null;

    function clear() {
      charts.forEach((one) => one.clear());
      current = null;
    }
    function select(active, step) {
      current = step;
      charts.forEach((one) => {
        one.clear();
        one.mark(step);
      });
      active.tell(step);
    }
    for (const active of charts) {
      active.svg.addEventListener("pointermove", (event) => {
        const step = active.stepAt(event.clientX);
        if (step !== null) select(active, step);
      });
      active.svg.addEventListener("pointerleave", clear);
      active.figure.addEventListener("blur", clear);
      active.figure.addEventListener("keydown", (event) => {
        const known = active.steps();
        const moves = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity };
        if (event.key === "Escape") clear();
        if (!(event.key in moves) || !known.length) return;
        event.preventDefault();
        const from = current === null ? (moves[event.key] > 0 ? -1 : known.length) : nearest(known, current);
        select(active, known[clamp(from + moves[event.key], 0, known.length - 1)]);
        reading.textContent = active.sentence(current);
      });
    }

    for (const button of section.querySelectorAll("button.key")) {
      button.addEventListener("click", () => {
        const method = button.dataset.method;
        if (!hidden.delete(method)) hidden.add(method);
        button.setAttribute("aria-pressed", String(!hidden.has(method)));
        for (const line of section.querySelectorAll(".line")) {
          line.classList.toggle("off", hidden.has(line.dataset.method));
        }
        clear();
      });
    }
    if (section.querySelector(".has-smooth")) {
      const box = byId("smoothing");
      box.closest("label").hidden = false;
      box.addEventListener("change", () => section.classList.toggle("raw-only", !box.checked));
    }
  }

  // ---- rollouts ------------------------------------------------------------------------------------------------
  const TINTS = [
    { key: "teacher_weight", label: "Teacher weight", top: () => 1 },
    { key: "kl_student", label: "KL to student", top: (rows) => peak(rows, "kl_student") },
    { key: "accepted", label: "Rejected drafts", top: () => 1 },
  ];

  function peak(rows, key) {
    let top = 0;
    for (const row of rows) for (const value of row[key] ?? []) if (value !== null && value > top) top = value;
    return top || 1;
  }

  const mean = (values) => {
    const known = (values ?? []).filter((value) => value !== null);
    return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
  };

  const rejectedIn = (row) => (row.accepted ?? []).filter((value) => value === 0).length;

  function viewer(data) {
    const root = byId("viewer");
    if (!root) return;
    const rows = data.rollouts;
    const methods = data.methods.filter((method) => rows.some((row) => row.method === method.name));
    const tints = TINTS.filter((tint) => rows.some((row) => row[tint.key]?.length));
    const state = { method: methods[0].name, step: null, row: null, tint: tints[0] ?? null };

    const list = element("ul", { class: "rows" });
    const detail = element("div", { class: "detail" });
    const methodSelect = element("select", {}, ...methods.map((m) => element("option", { value: m.name }, m.label)));
    const stepSelect = element("select", {});
    const earlier = element("button", { type: "button", "aria-label": "Earlier step" }, "‹");
    const later = element("button", { type: "button", "aria-label": "Later step" }, "›");
    const scale = element("span", { class: "scale" });
    const choices = tints.map((tint) => element("button", { type: "button", "aria-pressed": "false" }, tint.label));

    const control = (name, ...inner) => element("label", { class: "control" }, name, ...inner);
    root.append(
      element("div", { class: "controls" },
        ...(methods.length > 1 ? [control("Method", methodSelect)] : []),
        element("span", { class: "control" }, control("Step", stepSelect), earlier, later),
        ...(tints.length ? [
          element("span", { class: "choices", role: "group", "aria-label": "Tint tokens by" }, ...choices),
          scale,
        ] : [])),
      element("div", { class: "panes" }, list, detail));

    const ofMethod = () => rows.filter((row) => row.method === state.method);
    const stepsOf = () => [...new Set(ofMethod().map((row) => row.step))].sort((a, b) => a - b);

    function chooseMethod(name) {
      state.method = name;
      const steps = stepsOf();
      stepSelect.replaceChildren(...steps.map((step) => element("option", { value: String(step) }, String(step))));
      chooseStep(steps[nearest(steps, state.step ?? steps[0])]);
    }

    function chooseStep(step) {
      state.step = step;
      const steps = stepsOf();
      stepSelect.value = String(step);
      earlier.disabled = step === steps[0];
      later.disabled = step === steps[steps.length - 1];
      const here = ofMethod().filter((row) => row.step === step);
      list.replaceChildren(...here.map((row) => element("li", {}, rowButton(row))));
      chooseRow(here[0]);
    }

    function rowButton(row) {
      const facts = [row.length === null ? "length unknown" : `${row.length} tokens`];
      if (row.teacher_weight) facts.push(`weight ${show(mean(row.teacher_weight), "number", 2)}`);
      if (row.accepted) facts.push(`${rejectedIn(row)} rejected`);
      const button = element("button", { type: "button" },
        element("span", { class: "excerpt" }, visible(row.prompt).replace(/\s+/g, " ") || "(empty prompt)"),
        element("span", {}, row.reward === null ? "" : `reward ${show(row.reward)}`),
        element("span", { class: "meta" }, facts.join(" · ")));
      button.addEventListener("click", () => chooseRow(row));
      return button;
    }

    function chooseRow(row) {
      state.row = row;
      const here = ofMethod().filter((other) => other.step === state.step);
      [...list.querySelectorAll("button")].forEach((button, k) =>
        button.setAttribute("aria-current", String(here[k] === row)));
      drawRow();
    }

    function drawRow() {
      const row = state.row;
      const readout = element("dl", { class: "readout", "aria-live": "polite" });
      const tokens = element("div", { class: "tokens", role: "group",
        "aria-label": "Completion, token by token. Arrow keys move between tokens." });
      const spans = row.tokens.map((text, index) => token(row, text, index));
      if (spans.length) spans[0].tabIndex = 0;
      tokens.append(...spans);
      const read = (index) => readout.replaceChildren(...reading(row, index));
      const rest = () => readout.replaceChildren(...overview(row));
      const indexOf = (target) => spans.indexOf(target.closest(".tok"));
      tokens.addEventListener("pointerover", (event) => indexOf(event.target) >= 0 && read(indexOf(event.target)));
      tokens.addEventListener("pointerleave", rest);
      tokens.addEventListener("focusin", (event) => indexOf(event.target) >= 0 && read(indexOf(event.target)));
      tokens.addEventListener("focusout", rest);
      tokens.addEventListener("keydown", (event) => {
        const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -10, ArrowDown: 10, Home: -Infinity, End: Infinity };
        const from = indexOf(event.target);
        if (!(event.key in moves) || from < 0) return;
        event.preventDefault();
        const to = clamp(from + moves[event.key], 0, spans.length - 1);
        spans[from].tabIndex = -1;
        spans[to].tabIndex = 0;
        spans[to].focus();
      });
      rest();
      const cut = row.length === null || row.length <= row.tokens.length ? "" : `, first ${row.tokens.length} of ${row.length} tokens`;
      detail.replaceChildren(
        element("p", { class: "part" }, row.prompt_cut ? "Prompt, cut" : "Prompt"),
        element("p", { class: "text" }, visible(row.prompt)),
        element("p", { class: "part" }, `Completion${cut}`),
        tokens, readout);
      tint();
    }

    function token(row, text, index) {
      const span = element("span", { class: "tok", tabIndex: -1 });
      visible(text).split(/(\n)/).forEach((part) =>
        span.append(part === "\n" ? element("span", { class: "end" }, "\n") : part));
      if (row.accepted?.[index] === 0) span.dataset.rejected = "";
      return span;
    }

    function tint() {
      if (!state.tint) return;
      const top = state.tint.top(rows);
      const byDraft = state.tint.key === "accepted";
      const values = state.row[state.tint.key] ?? [];
      detail.querySelectorAll(".tok").forEach((span, index) => {
        const value = values[index] ?? null;
        const strength = value === null ? 0 : byDraft ? Number(value === 0) : clamp(value / top, 0, 1);
        span.style.setProperty("--a", strength.toFixed(3));
        span.classList.toggle("rejected", byDraft && value === 0);
      });
      choices.forEach((button, k) => button.setAttribute("aria-pressed", String(tints[k] === state.tint)));
      scale.replaceChildren(...(byDraft
        ? [element("i", { class: "flat" }), "draft rejected, token replaced"]
        : ["0", element("i"), show(top)]));
    }

    function pairs(entries) {
      return entries.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value)));
    }

    function reading(row, index) {
      const text = visible(row.tokens[index]).replace(/\n/g, "↵").replace(/^ +$/, (spaces) => "␣".repeat(spaces.length));
      const entries = [[`Token ${index + 1}`, element("code", {}, text)]];
      if (row.teacher_weight) entries.push(["Teacher weight", show(row.teacher_weight[index])]);
      if (row.kl_student) entries.push(["KL to student", show(row.kl_student[index])]);
      if (row.accepted?.[index] === 0) entries.push(["Draft", "rejected"]);
      else if (row.accepted?.[index] === 1) entries.push(["Draft", "kept"]);
      return pairs(entries);
    }

    function overview(row) {
      const entries = [["Reward", show(row.reward)]];
      if (row.teacher_weight) entries.push(["Mean teacher weight", show(mean(row.teacher_weight), "number", 3)]);
      if (row.kl_student) entries.push(["Mean KL to student", show(mean(row.kl_student), "number", 3)]);
      if (row.accepted) entries.push(["Drafts rejected", `${rejectedIn(row)} of ${row.accepted.length}`]);
      return pairs(entries);
    }

    const moveStep = (by) => {
      const steps = stepsOf();
      chooseStep(steps[clamp(steps.indexOf(state.step) + by, 0, steps.length - 1)]);
    };
    methodSelect.addEventListener("change", () => chooseMethod(methodSelect.value));
    stepSelect.addEventListener("change", () => chooseStep(Number(stepSelect.value)));
    earlier.addEventListener("click", () => moveStep(-1));
    later.addEventListener("click", () => moveStep(1));
    choices.forEach((button, k) => button.addEventListener("click", () => {
      state.tint = tints[k];
      tint();
    }));
    chooseMethod(state.method);
  }

  // ---- start ---------------------------------------------------------------------------------------------------
  applyTheme(THEMES.includes(stored()) ? stored() : "auto");
  document.addEventListener("DOMContentLoaded", () => {
    const data = JSON.parse(byId("data").textContent);
    themeSwitch();
    curves(data);
    viewer(data);
    addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => (one.open = true)));
  });
})();
