// How charts look: colours, dashes, hatches, axes, legends. Lines and fields can be told apart without colours.

// Room around the plots: top, right, bottom, left. The timeline of requests keeps the same.
const PADDING = [8, 24, 0, 0], AXIS = 58;
const DASHES = [[], [8, 4], [2, 3], [12, 3, 2, 3], [5, 5], [14, 5], [2, 7], [8, 3, 2, 3, 2, 3]];
const HATCHES = ["plain", "rising", "dots", "falling", "level", "cross", "upright", "coarse"];

// Colours of the theme. To ask the browser for each bar of thousands would take longer than to draw it.
const styles = new Map();
function style(name) {
  if (!styles.has(name)) styles.set(name, getComputedStyle(document.documentElement).getPropertyValue(name).trim());
  return styles.get(name);
}
const colour = (i) => style(`--c${i % 8}`);

// A fill that can be told from others without colours.
function hatch(context, i) {
  const kind = HATCHES[i % HATCHES.length];
  const key = `${kind} ${colour(i)} ${style("--page")}`;
  hatch.made = hatch.made || new Map();
  if (!hatch.made.has(key)) {
    const ratio = devicePixelRatio || 1;
    const size = Math.round(8 * ratio);
    const tile = Object.assign(document.createElement("canvas"), { width: size, height: size });
    const c = tile.getContext("2d");
    c.fillStyle = style("--page");
    c.fillRect(0, 0, size, size);
    c.globalAlpha = 0.55;
    c.fillStyle = c.strokeStyle = colour(i);
    c.fillRect(0, 0, size, size);
    c.globalAlpha = 1;
    c.lineWidth = ratio * 1.2;
    const line = (x0, y0, x1, y1) => {
      c.beginPath();
      c.moveTo(x0 * size, y0 * size);
      c.lineTo(x1 * size, y1 * size);
      c.stroke();
    };
    if (kind === "rising" || kind === "cross") [-1, 0, 1].forEach((d) => line(d, 1, d + 1, 0));
    if (kind === "falling" || kind === "cross") [-1, 0, 1].forEach((d) => line(d, 0, d + 1, 1));
    if (kind === "level" || kind === "coarse") line(0, 0.5, 1, 0.5);
    if (kind === "upright" || kind === "coarse") line(0.5, 0, 0.5, 1);
    if (kind === "dots") {
      c.beginPath();
      c.arc(size / 2, size / 2, size * 0.17, 0, 7);
      c.fill();
    }
    hatch.made.set(key, context.createPattern(tile, "repeat"));
  }
  return hatch.made.get(key);
}

// ---- the parts of a chart

function element(tag, attributes = {}, ...children) {
  const e = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") e.className = value;
    else e.setAttribute(name, value);
  }
  e.append(...children);
  return e;
}

// A short piece of a line, or a field of a stack, for the legend.
function swatch(i, filled, shade = i) {
  const canvas = element("canvas", { class: "swatch", "aria-hidden": "true" });
  const ratio = devicePixelRatio || 1;
  canvas.width = 30 * ratio;
  canvas.height = 12 * ratio;
  canvas.paint = () => {
    const c = canvas.getContext("2d");
    c.clearRect(0, 0, canvas.width, canvas.height);
    c.strokeStyle = colour(shade);
    if (filled) {
      c.fillStyle = hatch(c, i);
      c.fillRect(0, 0, canvas.width, canvas.height);
      c.lineWidth = ratio;
      c.strokeRect(0, 0, canvas.width, canvas.height);
    } else {
      c.lineWidth = 2 * ratio;
      c.setLineDash(DASHES[i % DASHES.length].map((d) => d * ratio));
      c.beginPath();
      c.moveTo(0, canvas.height / 2);
      c.lineTo(canvas.width, canvas.height / 2);
      c.stroke();
    }
  };
  canvas.paint();
  return canvas;
}

function nameOf(line) {
  const run = model.runs[line.run];
  const many = run.lines.filter((other) => other.source === line.source).length > 1;
  const which = many ? `engine ${line.source === "core" ? "core " : ""}${line.number}` : "";
  return [model.runs.length > 1 ? run.name : "", which].filter(Boolean).join(", ");
}

function frame(spec, title, place) {
  const legend = element("div", { class: "legend" });
  const plot = element("div", { class: "plot" });
  const heading = element("h3", {}, title);
  place.append(heading);
  if (spec.explain) place.append(element("p", { class: "explain" }, spec.explain));
  place.append(legend, plot);
  return { legend, plot };
}

function legendEntry(place, text, mark, toggle) {
  const value = element("span", { class: "value" });
  const entry = element("button", { type: "button", class: "entry", "aria-pressed": "true" }, mark, element("span", {}, text), value);
  entry.addEventListener("click", () => {
    const shown = entry.getAttribute("aria-pressed") !== "true";
    entry.setAttribute("aria-pressed", shown);
    toggle(shown);
  });
  place.append(entry);
  return value;
}

function axes(spec, xUnit, xLog = false) {
  const shared = {
    stroke: () => style("--quiet"),
    grid: { stroke: () => style("--grid"), width: 1 },
    ticks: { stroke: () => style("--grid"), width: 1, size: 4 },
    font: "11px system-ui, sans-serif",
  };
  return [
    { ...shared, size: 26, values: (u, marks) => marks.map(xUnit), ...(xLog ? decades(shared) : {}) },
    { ...shared, size: AXIS, values: (u, marks) => marks.map(MARKS[spec.unit]), ...(spec.log ? decades(shared) : {}) },
  ];
}

// Of a logarithmic axis only the powers of ten are marked.
function decades(shared) {
  const filter = (u, marks) => marks.map((v) => (v != null && Math.abs(Math.log10(v) - Math.round(Math.log10(v))) < 1e-6 ? v : null));
  return { filter, grid: { ...shared.grid, filter }, ticks: { ...shared.ticks, filter } };
}

function verticalScale(spec) {
  if (spec.log) {
    return {
      distr: 3,
      range: (u, low, high) => {
        if (!(low > 0) || !Number.isFinite(high)) return [1e-3, 1];
        return [10 ** Math.floor(Math.log10(low) - 1e-9), 10 ** Math.ceil(Math.log10(high) + 1e-9)];
      },
    };
  }
  return {
    range: (u, low, high) => {
      if (high == null || !Number.isFinite(high) || high <= 0) return [0, spec.unit === "share" ? 1 : 1];
      if (spec.unit === "share") return [0, high > 0.5 ? Math.max(1, high) * 1.02 : high * 1.15];
      return [0, high * 1.08];
    },
  };
}

const timeUnder = (u, event) => u.posToVal(event.clientX - u.over.getBoundingClientRect().left, "x");

const markSeconds = (value) => (value == null ? "" : `${+value.toFixed(6)} s`);

