"use strict";
// Draws every section, again when a picker, the theme or the paper changes. What is drawn comes from Python.
(() => {
  const read = (name) => JSON.parse(document.getElementById("data-" + name).textContent);
  const report = { ...read("looks"), sections: [...document.querySelectorAll(".plot")].map(lazily) };
  const root = document.documentElement;
  const touch = matchMedia("(pointer: coarse)").matches;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const bare = matchMedia("(max-width: 560px)"); // as in page.css
  const chosen = {};
  let paper = false;

  const theme = () => (paper ? "light" : root.dataset.theme || (dark.matches ? "dark" : "light"));

  // A section by its picture; the figure is read when it is first asked for, so that the first one is there soon.
  function lazily(target) {
    const name = target.id.replace("plot-", "");
    let found = null;
    const whole = () => (found = found || read(name));
    return {
      name,
      picker: target.dataset.picker,
      get figure() { return whole().figure; },
      get choices() { return whole().choices; },
    };
  }

  const place = (section) => document.getElementById("plot-" + section.name);

  // A deep copy with colours of this theme; typed arrays stay text until plotly decodes them.
  function coloured(value, colours) {
    if (typeof value === "string") return colours[value] || value;
    if (Array.isArray(value)) return value.map((each) => coloured(each, colours));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, each]) => [key, coloured(each, colours)]));
  }

  function narrowed(data, narrow) {
    if (narrow) for (const trace of data) if (trace.colorbar) Object.assign(trace.colorbar, { thickness: 7, title: null });
    return data;
  }

  function draw(section) {
    const target = place(section);
    const colours = theme() === "dark" ? report.dark : {};
    const changes = section.choices[chosen[section.picker]] || [];
    const data = section.figure.data.map((trace, i) => coloured({ ...trace, ...changes[i] }, colours));
    if (theme() === "dark") for (const trace of data) if (trace.reversescale) trace.reversescale = false; // 0 recedes
    const layout = coloured(section.figure.layout, colours);
    const narrow = target.clientWidth < 560;
    layout.template = report.templates[theme()];
    layout.uirevision = section.name;
    layout.dragmode = touch ? false : "zoom";
    // Where the buttons always show, the legend gets a line of its own below them; the smallest screens have none.
    const room = narrow && !bare.matches ? 56 : 0;
    if (narrow) layout.margin = { ...layout.margin, l: Math.min(52, layout.margin.l), r: 4, t: layout.margin.t + room };
    layout.height += room;
    if (paper) Object.assign(layout, { width: 690, height: 0.72 * layout.height });
    const config = {
      responsive: true, displaylogo: false, displayModeBar: touch ? true : "hover",
      modeBarButtons: [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
      toImageButtonOptions: { filename: "gemopt-" + section.name, scale: 2 },
    };
    target.querySelector(".sketch")?.remove();
    return Plotly.react(target, narrowed(data, narrow), layout, config);
  }

  const drawAll = (wanted = () => true) => Promise.all(report.sections.filter(wanted).map(draw));

  function choose(picker, choice) {
    chosen[picker] = choice;
    return drawAll((section) => section.picker === picker);
  }

  function bindPicker(select) {
    chosen[select.dataset.picker] = select.value;
    select.addEventListener("change", () => choose(select.dataset.picker, select.value));
    for (const button of document.querySelectorAll(`button[data-step][data-for="${select.dataset.picker}"]`)) {
      button.addEventListener("click", () => {
        const to = select.selectedIndex + Number(button.dataset.step);
        select.selectedIndex = (to + select.length) % select.length;
        choose(select.dataset.picker, select.value);
      });
    }
  }

  // Zoom and move with the keyboard, on every axis of the picture.
  function onKey(event) {
    const target = event.currentTarget;
    const shift = { ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, 0.1], ArrowDown: [0, -0.1] }[event.key];
    const factor = { "+": 0.7, "=": 0.7, "-": 1 / 0.7 }[event.key];
    if (event.ctrlKey || event.metaKey || event.altKey || !(shift || factor || event.key === "0")) return;
    event.preventDefault();
    const change = {};
    for (const name of Object.keys(target._fullLayout).filter((key) => /^[xy]axis\d*$/.test(key))) {
      if (event.key === "0") {
        const range = started(target, name).range;
        change[name + (range ? ".range" : ".autorange")] = range || true;
        continue;
      }
      const [a, b] = target._fullLayout[name].range.map(Number);
      const by = shift ? (b - a) * shift[name[0] === "x" ? 0 : 1] : 0;
      const middle = (a + b) / 2, half = ((b - a) / 2) * (factor || 1);
      change[name + ".range"] = [middle - half + by, middle + half + by];
    }
    Plotly.relayout(target, change);
  }

  // An axis as Python made it.
  function started(target, name) {
    return report.sections.find((each) => place(each) === target).figure.layout[name] || {};
  }

  function onPaper(begins) {
    paper = begins;
    drawAll();
  }

  document.querySelectorAll("select[data-picker]").forEach(bindPicker);
  document.getElementById("theme").addEventListener("click", () => {
    root.dataset.theme = theme() === "dark" ? "light" : "dark";
    drawAll();
  });
  dark.addEventListener("change", () => drawAll());
  addEventListener("beforeprint", () => onPaper(true));
  addEventListener("afterprint", () => onPaper(false));
  for (const section of report.sections) place(section).addEventListener("keydown", onKey);

  // The first picture at once, the others one by one so that the page can be scrolled meanwhile.
  (async () => {
    for (const section of report.sections) {
      await draw(section);
      root.dataset.drawn = 1 + Number(root.dataset.drawn || 0);
      await new Promise((next) => setTimeout(next));
    }
    root.dataset.ready = "yes";
  })();
})();
