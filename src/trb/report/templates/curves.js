// ---- curves ----------------------------------------------------------------------------------------------------
// Charts with the same `axis` share their x positions: reading one marks the same place in the others.
function chart(data, plot, hidden) {
  const figure = byId(`figure-${data.id}`);
  const svg = figure.querySelector(":scope > svg");
  const ends = { y1: plot.top, y2: plot.height - plot.bottom };
  const pin = shape("line", { class: "pin", hidden: "", ...ends });
  const cursor = shape("g", { class: "cursor", hidden: "" });
  const rule = shape("line", ends);
  cursor.append(rule);
  const dots = data.series.map((series) => {
    const dot = shape("circle", { r: 3.4, class: `s${series.style}` });
    cursor.append(dot);
    return dot;
  });
  svg.append(pin, cursor);
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

  function place(step) {
    return `${data.xName} ${data.xLabels?.[step] ?? step}`;
  }

  function describe(step) {
    return shown().map((series) => {
      const i = at(series, step);
      const value = i < 0 ? null : series.y[i];
      const line = { label: series.label, style: series.style, value: show(value, data.format), extra: [] };
      if (value !== null && series.low && series.low[i] !== null && series.high[i] !== null) {
        const [low, high] = [series.low[i], series.high[i]];
        line.extra.push([data.intervalName, `${show(low, data.format)} to ${show(high, data.format)}`]);
      }
      if (value !== null && series.bound) line.extra.push([data.boundName, show(series.bound[i], data.format)]);
      return line;
    });
  }

  return {
    figure, svg, steps, axis: data.axis,
    stepAt(clientX) {
      const box = svg.getBoundingClientRect();
      const units = ((clientX - box.left) / box.width) * plot.width;
      const known = steps();
      return known.length ? known[nearest(known, x0 + ((units - left) / width) * (x1 - x0))] : null;
    },
    sentence(step) {
      const parts = describe(step).map((line) => [line.label, line.value, ...line.extra.flat()].join(" "));
      return `${data.title}, ${place(step)}: ${parts.join("; ")}`;
    },
    pin(step) {
      pin.toggleAttribute("hidden", step === null || step < x0 || step > x1);
      if (step === null) return;
      pin.setAttribute("x1", px(step));
      pin.setAttribute("x2", px(step));
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
      tip.replaceChildren(element("div", { class: "when" }, place(step)), ...lines);
      tip.hidden = false;
      const spot = (px(step) / plot.width) * svg.clientWidth;
      const beside = spot + 14 + tip.offsetWidth <= svg.clientWidth ? spot + 14 : spot - 14 - tip.offsetWidth;
      tip.style.left = `${clamp(beside, 0, Math.max(0, svg.clientWidth - tip.offsetWidth))}px`;
      tip.style.top = `${figure.querySelector("figcaption").offsetHeight + 4}px`;
    },
    clear() {
      cursor.setAttribute("hidden", "");
      tip.hidden = true;
    },
  };
}

// One section of charts with a legend; returns its charts. `onChoose(axis, step)` hears clicks on a chart.
function curves(section, data, onChoose) {
  const hidden = new Set();
  const charts = data.charts.filter((one) => one.section === section.id).map((one) => chart(one, data.plot, hidden));
  const reading = section.querySelector(".reading");
  let current = null;

  function clear() {
    charts.forEach((one) => one.clear());
    current = null;
  }
  function select(active, step) {
    current = step;
    for (const one of charts) {
      one.clear();
      if (one.axis === active.axis) one.mark(step);
    }
    active.tell(step);
  }
  for (const active of charts) {
    active.svg.addEventListener("pointermove", (event) => {
      const step = active.stepAt(event.clientX);
      if (step !== null) select(active, step);
    });
    active.svg.addEventListener("pointerleave", clear);
    active.svg.addEventListener("click", (event) => {
      const step = active.stepAt(event.clientX);
      if (step !== null) onChoose(active.axis, step);
    });
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
    const label = section.querySelector(".smoothing");
    const box = label.querySelector("input");
    label.hidden = false;
    box.addEventListener("change", () => section.classList.toggle("raw-only", !box.checked));
  }
  return charts;
}
