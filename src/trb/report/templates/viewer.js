// ---- rollouts --------------------------------------------------------------------------------------------------
// Two methods side by side on the same prompt, rollout by rollout and step by step; every token tinted by one of its
// numbers, and all of its numbers in a panel of fixed height. Completions of an evaluation are shown as text: they belong
// to no step, `moment` says when they were made.
const TINTS = [
  { key: "teacher_weight", label: "Teacher weight", meaning: "share of the teacher in μ", range: () => [0, 1] },
  { key: "kl_student", label: "KL to student", meaning: "KL(μ ‖ student), nats", range: (values) => [0, peak(values)] },
  { key: "accepted", label: "Acceptance" },
  {
    key: "teacher_log_prob", label: "Teacher log-prob.", meaning: "log-probability under the teacher, nats",
    // The rarest hundredth shares the strongest tint; otherwise one unlikely token would leave all others pale.
    range: (values) => [0, lowest(values, 0.01)],
  },
];
const LAWS = [["student", "Student"], ["teacher", "Teacher"], ["behavior", "μ, sampled from"]];
const NOBODY = "";
// As long as this and no longer: the panel keeps its height whatever a token holds.
const LONGEST_TOKEN = 24;

function peak(values) {
  return values.reduce((top, value) => Math.max(top, value), 0) || 1;
}

function lowest(values, share) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted.length ? Math.min(sorted[Math.floor(share * sorted.length)], -1e-3) : -1;
}

const mean = (values) => {
  const known = (values ?? []).filter((value) => value !== null);
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
};

const rejectedIn = (row) => (row.accepted ?? []).filter((value) => value === 0).length;

const shorten = (text) => (text.length > LONGEST_TOKEN ? `${text.slice(0, LONGEST_TOKEN - 1)}…` : text);

function viewer(root, data, onStep) {
  const rows = data.rollouts;
  const methods = new Map(data.methods.map((method) => [method.name, method]));
  const tints = TINTS.filter((tint) => rows.some((row) => row[tint.key]?.length)).map((tint) => ({
    ...tint,
    ends: tint.range?.(rows.flatMap((row) => row[tint.key] ?? []).filter((value) => value !== null)),
  }));
  const most = Math.max(0, ...rows.flatMap((row) => row.alternatives ?? []).flatMap(
    (laws) => (laws ?? []).map((flat) => flat.length / 2)));
  const state = {
    group: 0, methods: [NOBODY, NOBODY], steps: [], step: 0, pairs: [], pair: 0, tint: tints[0] ?? null,
    held: null, // reads the token that has the focus again
  };

  // -- the parts of the page
  const populated = [...new Set(rows.map((row) => row.group))].sort((a, b) => a - b);
  const groupSelect = element("select", {}, ...populated.map((group) =>
    element("option", { value: String(group) }, data.groups[group].label)));
  const selects = ["First method", "Second method"].map((name) => element("select", { "aria-label": name }));
  const slider = element("input", { type: "range", class: "slider", min: "0", step: "1", "aria-label": "Training step" });
  const stepName = element("output", { class: "step-name" });
  const earlier = element("button", { type: "button", "aria-label": "Earlier step" }, "‹");
  const later = element("button", { type: "button", "aria-label": "Later step" }, "›");
  const choices = tints.map((tint) => element("button", { type: "button", "aria-pressed": "false" }, tint.label));
  const scale = element("div", { class: "scale", "aria-live": "polite" });
  const list = element("ul", { class: "rows" });
  const prompt = element("p", { class: "text prompt" });
  const promptName = element("p", { class: "part" });
  const taught = element("div", { class: "taught" });
  const panes = element("div", { class: "panes" });
  const panel = element("div", { class: "panel", "aria-hidden": "true" });
  const spoken = element("p", { class: "sr spoken", "aria-live": "polite" });
  const control = (name, ...inner) => element("label", { class: "control" }, name, ...inner);
  panel.classList.toggle("plain", !most);
  const several = new Set(rows.map((row) => row.method)).size > 1;
  root.append(
    element("div", { class: "controls" },
      ...(populated.length > 1 ? [control(data.groupName, groupSelect)] : []),
      ...(several ? [element("span", { class: "control" }, "Compare", selects[0], "with", selects[1])] : []),
      ...(tints.length ? [element("span", { class: "control tint" }, "Tint by",
        element("span", { class: "choices", role: "group", "aria-label": "Tint tokens by" }, ...choices))] : [])),
    element("div", { class: "controls steps" }, control("Step", slider), earlier, later, stepName),
    scale, panel, spoken,
    element("div", { class: "split" }, list, element("div", { class: "detail" }, promptName, prompt, taught, panes)));

  // -- which rollouts
  const ofMethod = (name) => rows.filter((row) => row.group === state.group && row.method === name);
  const chosen = () => state.methods.filter((name) => name !== NOBODY);

  function chooseGroup(group) {
    state.group = group;
    groupSelect.value = String(group);
    const present = data.methods.map((method) => method.name).filter((name) => ofMethod(name).length);
    // The pair the paper compares, where both are here; otherwise what was chosen before, or the first two.
    const wanted = [...state.methods, "trb", "opd", ...present].filter((name) => present.includes(name));
    root.classList.toggle("as-text", rows.some((row) => row.group === group && row.moment));
    selects.forEach((select, side) => {
      const options = present.map((name) => element("option", { value: name }, methods.get(name).label));
      if (side) options.push(element("option", { value: NOBODY }, "nothing"));
      select.replaceChildren(...options);
    });
    chooseMethods([...new Set(wanted)].slice(0, 2));
  }

  function chooseMethods(names) {
    state.methods = names.length < 2 ? [...names, NOBODY] : names;
    selects.forEach((select, side) => (select.value = state.methods[side]));
    const before = state.steps[state.step] ?? 0;
    state.steps = [...new Set(chosen().flatMap((name) => ofMethod(name).map((row) => row.step)))].sort((a, b) => a - b);
    slider.max = String(state.steps.length - 1);
    slider.disabled = state.steps.length < 2;
    chooseStep(nearest(state.steps, before));
  }

  function chooseStep(index) {
    state.step = clamp(index, 0, state.steps.length - 1);
    const step = state.steps[state.step];
    slider.value = String(state.step);
    slider.setAttribute("aria-valuetext", `step ${step}`);
    stepName.textContent = `step ${step}`;
    earlier.disabled = state.step === 0;
    later.disabled = state.step === state.steps.length - 1;
    state.pairs = matched(step);
    list.replaceChildren(...state.pairs.map((pair, k) => element("li", {}, pairButton(pair, k))));
    onStep(data.groups[state.group].name, step);
    choosePair(Math.min(state.pair, state.pairs.length - 1));
  }

  // Rollouts of one step by prompt and rollout index: [first method's or null, second method's or null].
  function matched(step) {
    const found = new Map();
    state.methods.forEach((name, side) => ofMethod(name).filter((row) => row.step === step).forEach((row) => {
      const key = JSON.stringify([row.match, row.rollout_index]);
      if (!found.has(key)) found.set(key, [null, null]);
      found.get(key)[side] ??= row;
    }));
    return [...found.values()];
  }

  function pairButton(pair, index) {
    const any = pair[0] ?? pair[1];
    const facts = pair.flatMap((row) => row === null ? [] : [
      `${methods.get(row.method).label} ${row.reward === null ? "" : `${verdictOn(row)}, `}${lengthOf(row)}`]);
    const button = element("button", { type: "button" },
      element("span", { class: "excerpt" }, visible(any.prompt).replace(/\s+/g, " ") || "(empty prompt)"),
      element("span", { class: "meta" }, any.name ?? `rollout ${any.rollout_index + 1}`),
      ...facts.map((fact) => element("span", { class: "meta" }, fact)));
    button.addEventListener("click", () => choosePair(index));
    return button;
  }

  const verdictOn = (row) => (row.moment ? (row.reward ? "right" : "wrong") : `reward ${show(row.reward)}`);
  const lengthOf = (row) => (row.length === null ? "length unknown" : `${row.length} tokens`);

  function choosePair(index) {
    state.pair = index;
    [...list.querySelectorAll("button")].forEach((button, k) => button.setAttribute("aria-current", String(k === index)));
    drawPair();
  }

  // -- the rollouts themselves
  function drawPair() {
    const pair = state.pairs[state.pair];
    const any = pair[0] ?? pair[1];
    promptName.textContent = any.prompt_cut ? "Prompt, cut" : "Prompt";
    prompt.textContent = visible(any.prompt);
    taught.replaceChildren(...(any.teacher_prompt ? [element("p", { class: "part" }, "The teacher's prompt"),
      element("p", { class: "text prompt" }, visible(any.teacher_prompt))] : []));
    const sides = [0, 1].filter((side) => state.methods[side] !== NOBODY);
    panes.replaceChildren(...sides.map((side) => pane(pair, side)));
    panes.classList.toggle("two", sides.length > 1);
    state.held = null;
    rest();
    paint();
  }

  function pane(pair, side) {
    const row = pair[side];
    const method = methods.get(state.methods[side]);
    const colour = method.style === null ? "reference" : `s${method.style}`;
    const name = element("p", { class: `part ${colour}` }, element("i"), element("b", {}, method.label));
    if (row === null) {
      const when = pair[1 - side].moment ? "kept" : `recorded at step ${state.steps[state.step]}`;
      return element("div", { class: "pane" }, name,
        element("p", { class: "missing" }, `No rollout of this prompt was ${when}.`));
    }
    if (row.moment) {
      name.append(` ${row.moment}${row.reward === null ? "" : `, ${verdictOn(row)}`}, ${lengthOf(row)}${row.cut ? ", cut" : ""}`);
      return element("div", { class: "pane" }, name, element("p", { class: "tokens" }, visible(row.tokens[0])));
    }
    const same = pair[1 - side] ? sharedStart(row.tokens, pair[1 - side].tokens) : null;
    const spans = row.tokens.map((text, index) => token(row, text, index, index === same));
    const box = element("div", {
      class: "tokens", role: "listbox", "aria-orientation": "horizontal",
      "aria-label": `Completion by ${method.label}, token by token. Arrow keys move between tokens.`,
    }, ...spans);
    listen(box, spans, (index) => read(row, index), (index) => speak(row, index));
    const cut = row.length === null || row.length <= row.tokens.length ? "" : `, the first ${row.tokens.length} shown`;
    name.append(` step ${row.step}, ${lengthOf(row)}${cut}`);
    const facts = element("dl", { class: "facts-of" }, ...pairsOf(overview(row, same)));
    return element("div", { class: "pane" }, name, box, facts);
  }

  function sharedStart(first, second) {
    const differs = first.findIndex((text, index) => text !== second[index]);
    return differs < 0 ? first.length : differs;
  }

  function token(row, text, index, forks) {
    const span = element("span", {
      class: forks ? "tok fork" : "tok", tabIndex: index ? -1 : 0, role: "option", "aria-selected": "false",
    });
    if (!text.trim()) span.setAttribute("aria-label", tokenName(text));
    visible(text).split(/(\n)/).forEach((part) =>
      span.append(part === "\n" ? element("span", { class: "end" }, "\n") : part));
    return span;
  }

  // Pointing reads a token; focusing it reads it aloud as well, and stays read when the pointer leaves.
  function listen(box, spans, onRead, onFocus) {
    const indexOf = (target) => spans.indexOf(target.closest(".tok"));
    box.addEventListener("pointerover", (event) => indexOf(event.target) >= 0 && onRead(indexOf(event.target)));
    box.addEventListener("pointerleave", () => (state.held ?? rest)());
    box.addEventListener("focusin", (event) => {
      const index = indexOf(event.target);
      spans.forEach((span, k) => {
        span.tabIndex = k === index ? 0 : -1;
        span.setAttribute("aria-selected", String(k === index));
      });
      state.held = () => onRead(index);
      state.held();
      onFocus(index);
    });
    box.addEventListener("focusout", () => {
      state.held = null;
      rest();
    });
    box.addEventListener("keydown", (event) => {
      const from = indexOf(event.target);
      const to = from < 0 ? null : moved(spans, from, event.key);
      if (to === null) return;
      event.preventDefault();
      spans[to].focus();
    });
  }

  // The token an arrow key leads to: the next one, or the nearest one on the line above or below.
  function moved(spans, from, key) {
    const last = spans.length - 1;
    if (key === "Home" || key === "End") return key === "Home" ? 0 : last;
    if (key === "ArrowLeft" || key === "ArrowRight") return clamp(from + (key === "ArrowLeft" ? -1 : 1), 0, last);
    if (key !== "ArrowUp" && key !== "ArrowDown") return null;
    const by = key === "ArrowUp" ? -1 : 1;
    const here = spans[from].getClientRects()[0];
    let best = from;
    let line = null;
    let least = Infinity;
    for (let k = from + by; k >= 0 && k <= last; k += by) {
      const box = spans[k].getClientRects()[0];
      if (Math.abs(box.top - here.top) < 2) continue;
      line ??= box.top;
      if (Math.abs(box.top - line) >= 2) break;
      const distance = Math.abs(box.left - here.left);
      if (distance < least) [best, least] = [k, distance];
    }
    return best;
  }

  // -- tint
  function paint() {
    choices.forEach((button, k) => button.setAttribute("aria-pressed", String(tints[k] === state.tint)));
    if (!state.tint) return;
    const { key, ends, meaning } = state.tint;
    const shownRows = state.pairs[state.pair].filter((row) => row !== null);
    [...panes.querySelectorAll(".tokens")].forEach((box, side) => [...box.children].forEach((span, index) => {
      const value = shownRows[side][key]?.[index] ?? null;
      const strength = value === null ? 0 : ends ? clamp((value - ends[0]) / (ends[1] - ends[0]), 0, 1) : Number(value === 0);
      span.style.setProperty("--a", strength.toFixed(3));
      span.classList.toggle("rejected", !ends && value === 0);
      span.classList.toggle("unknown", value === null);
    }));
    const swatch = (strength, ...also) => {
      const patch = element("i", { class: ["patch", ...also].join(" ") });
      patch.style.setProperty("--a", String(strength));
      return patch;
    };
    scale.replaceChildren(...(ends
      ? [element("span", {}, `${meaning}:`), ...[0, 0.25, 0.5, 0.75, 1].map((part) =>
        element("span", { class: "stop" }, swatch(part), show(ends[0] + part * (ends[1] - ends[0]), "number", 2)
          + (part === 1 && key === "teacher_log_prob" ? " or less" : "")))]
      : [element("span", { class: "stop" }, swatch(0), "draft kept (1)"),
        element("span", { class: "stop" }, swatch(1, "rejected"), "draft rejected, token replaced (0)")]));
  }

  // -- numbers
  const pairsOf = (entries) => entries.map(([name, value]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, value)));

  function probability(value) {
    if (value === null) return "–";
    return value > 0 && value < 0.001 ? value.toExponential(0) : value.toFixed(3);
  }

  function numbersOf(row, index) {
    const entries = [];
    const add = (key, name, text) => row[key]?.length && entries.push([name, text(row[key][index])]);
    const withLog = (value) => (value === null ? "–" : `${probability(Math.exp(value))} (log ${show(value, "number", 3)})`);
    add("teacher_weight", "Teacher weight", (value) => show(value, "number", 3));
    add("kl_student", "KL to student", (value) => show(value, "number", 3));
    add("kl_teacher", "KL to teacher", (value) => show(value, "number", 3));
    add("accepted", "Draft", (value) => (value === 0 ? "rejected" : value === null ? "–" : "kept"));
    add("student_log_prob", "Student", withLog);
    add("teacher_log_prob", "Teacher", withLog);
    return entries;
  }

  function alternativesOf(row, index) {
    const laws = row.alternatives?.[index];
    return laws ? LAWS.map(([, label], k) => [label, entriesOf(laws[k] ?? [])]) : [];
  }

  function entriesOf(flat) {
    const found = [];
    for (let k = 0; k + 1 < flat.length; k += 2) found.push([data.texts[flat[k]], flat[k + 1]]);
    return found;
  }

  function read(row, index) {
    const text = row.tokens[index];
    const title = element("p", { class: "title" }, `Token ${index + 1} `, element("code", {}, shorten(tokenName(text))));
    const numbers = element("dl", { class: "numbers" }, ...pairsOf(numbersOf(row, index)));
    const columns = alternativesOf(row, index).map(([label, entries]) =>
      element("div", { class: "law" }, element("p", { class: "part" }, label), ...entries.map(([other, value]) => {
        const bar = element("i", { class: "share" });
        bar.style.setProperty("--p", String(value ?? 0));
        return element("div", { class: other === text ? "alternative drawn" : "alternative" },
          element("code", {}, shorten(tokenName(other))), bar, element("span", {}, probability(value)));
      })));
    if (most && !columns.length) columns.push(element("p", { class: "missing" }, "No alternatives were recorded here."));
    panel.replaceChildren(element("div", {}, title, numbers), ...columns);
  }

  function speak(row, index) {
    const numbers = numbersOf(row, index).map((pair) => pair.join(" "));
    const laws = alternativesOf(row, index).map(([label, entries]) =>
      `${label}: ${entries.map(([text, value]) => `${tokenName(text)} ${probability(value)}`).join(", ")}`);
    spoken.textContent = [`Token ${index + 1} of ${row.tokens.length}, ${tokenName(row.tokens[index])}`, ...numbers, ...laws]
      .join("; ");
  }

  function rest() {
    panel.replaceChildren(element("p", { class: "missing" },
      "Point at a token, or tab to a completion and use the arrow keys, to read its numbers here."));
  }

  function overview(row, same) {
    const entries = [["Reward", show(row.reward)]];
    if (row.teacher_weight) entries.push(["Mean teacher weight", show(mean(row.teacher_weight), "number", 3)]);
    if (row.kl_student) entries.push(["Mean KL to student", show(mean(row.kl_student), "number", 3)]);
    if (row.teacher_log_prob) entries.push(["Mean teacher log-prob.", show(mean(row.teacher_log_prob), "number", 3)]);
    if (row.accepted) entries.push(["Drafts rejected", `${rejectedIn(row)} of ${row.accepted.filter((value) => value !== null).length}`]);
    if (same !== null) {
      entries.push(["Same start", same === row.tokens.length ? "all tokens" : `${same} tokens`]);
    }
    return entries;
  }

  // -- events
  groupSelect.addEventListener("change", () => chooseGroup(Number(groupSelect.value)));
  selects.forEach((select) => select.addEventListener("change", () => chooseMethods(selects.map((one) => one.value))));
  slider.addEventListener("input", () => chooseStep(Number(slider.value)));
  earlier.addEventListener("click", () => chooseStep(state.step - 1));
  later.addEventListener("click", () => chooseStep(state.step + 1));
  choices.forEach((button, k) => button.addEventListener("click", () => {
    state.tint = tints[k];
    paint();
  }));
  chooseGroup(populated[0]);

  return {
    // Show the step nearest to `step` in the group whose charts were clicked.
    goTo(axis, step) {
      const group = data.groups.findIndex((one) => one.name === axis);
      if (!populated.includes(group)) return;
      if (group !== state.group) chooseGroup(group);
      chooseStep(nearest(state.steps, step));
    },
    // Show what the student made of a problem before training, and a method after it.
    compare(match, model) {
      const ofModel = (number) => rows.find((row) => row.match === match && row.model === number);
      const found = [ofModel(0), ofModel(model || 1)].filter((row) => row !== undefined);
      if (!found.length) return;
      chooseGroup(found[0].group);
      chooseMethods(found.map((row) => row.method));
      choosePair(state.pairs.findIndex((pair) => (pair[0] ?? pair[1]).match === match));
    },
  };
}
