// The charts: lines and stacks over time, distributions, and points for requests, drawn by uPlot from what the view shows.

// Room around the plots: top, right, bottom, left. The timeline of requests keeps the same.
const PADDING = [8, 14, 0, 0], AXIS = 58;
const DASHES = [[], [8, 4], [2, 3], [12, 3, 2, 3], [5, 5], [14, 5], [2, 7], [8, 3, 2, 3, 2, 3]];
const HATCHES = ["plain", "rising", "dots", "falling", "level", "cross", "upright", "coarse"];

const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
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

// ---- what the view shows of some lines, on one common axis of x

// Few buckets are drawn as they are, from their begin to their end; many of them are put together for each pixel, with
// mean, smallest and largest value, so that none is left out.
function sampled(parts, width) {
  const ranges = parts.map(({ line }) => [
    Math.max(0, placeOf(line.end, view.from) - 1),
    Math.min(line.begin.length, placeOf(line.begin, view.to, true) + 1),
  ]);
  const most = Math.max(0, ...ranges.map(([from, to]) => to - from));
  return most <= width / 2 ? asTheyAre(parts, ranges) : perPixel(parts, ranges, Math.max(2, Math.floor(width)));
}

// What sticks out of the view is cut off at its edge: uPlot takes the height of the axis from the points in the view alone.
function asTheyAre(parts, ranges) {
  const apart = (3 * (view.to - view.from)) / 1000;
  const inView = (line, i) => [Math.max(line.begin[i], view.from), Math.min(line.end[i], view.to)];
  const gapAfter = (line, i, last) => i + 1 < last && line.begin[i + 1] - line.end[i] > apart;
  const middle = (line, i) => (line.end[i] + line.begin[i + 1]) / 2;
  const all = [];
  parts.forEach(({ line }, p) => {
    for (let i = ranges[p][0]; i < ranges[p][1]; i++) {
      const [from, to] = inView(line, i);
      if (from <= to) all.push(from, to);
      if (gapAfter(line, i, ranges[p][1])) all.push(middle(line, i));
    }
  });
  const xs = Float64Array.from(new Set(all)).sort();
  const columns = parts.map(({ line, curve }, p) => {
    const out = [0, 1, 2].map(() => new Array(xs.length));
    for (let i = ranges[p][0]; i < ranges[p][1]; i++) {
      const values = [curve.mean[i], curve.low[i], curve.high[i]];
      const [from, to] = inView(line, i);
      if (from <= to) {
        for (const place of [placeOf(xs, from), placeOf(xs, to)]) values.forEach((v, k) => (out[k][place] = Number.isNaN(v) ? null : v));
      }
      if (gapAfter(line, i, ranges[p][1])) out.forEach((column) => (column[placeOf(xs, middle(line, i))] = null));
    }
    return out;
  });
  return { xs: Array.from(xs), columns };
}

function perPixel(parts, ranges, width) {
  const step = (view.to - view.from) / width;
  const xs = Array.from({ length: width }, (_, c) => view.from + (c + 0.5) * step);
  const columns = parts.map(({ line, curve }, p) => {
    const sum = new Float64Array(width), count = new Uint32Array(width);
    const low = new Array(width).fill(null), high = new Array(width).fill(null);
    for (let i = ranges[p][0]; i < ranges[p][1]; i++) {
      const mean = curve.mean[i];
      if (Number.isNaN(mean)) continue;
      const from = Math.max(0, Math.floor((line.begin[i] - view.from) / step));
      const to = Math.min(width - 1, Math.floor((line.end[i] - view.from) / step));
      for (let c = from; c <= to; c++) {
        sum[c] += mean;
        count[c]++;
        if (low[c] === null || curve.low[i] < low[c]) low[c] = curve.low[i];
        if (high[c] === null || curve.high[i] > high[c]) high[c] = curve.high[i];
      }
    }
    return [Array.from(sum, (s, c) => (count[c] ? s / count[c] : null)), low, high];
  });
  return { xs, columns };
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

// A chart over time. `parts` are its lines: {line, curve, key, index, shade}.
class TimeChart {
  constructor(spec, title, parts, place) {
    this.spec = spec;
    this.parts = parts;
    this.element = place;
    const { legend, plot } = frame(spec, title, place);
    this.plot = plot;
    this.values = parts.map((part) =>
      legendEntry(legend, part.text, swatch(part.index, spec.kind === "stack", part.shade), (shown) => this.show(part, shown)),
    );
    this.make();
    register(this);
    timeMouse(this.u.over, (event) => timeUnder(this.u, event));
    new ResizeObserver(() => this.resize()).observe(plot);
  }

  // uPlot's series: of a stack the highest first, as each is filled down to zero; of lines the edges of the band first.
  make() {
    const stack = this.spec.kind === "stack";
    const series = [{}], bands = [];
    this.places = new Map();
    const order = stack ? [...this.parts].reverse() : this.parts;
    for (const part of order) {
      const stroke = () => colour(part.shade);
      if (stack) {
        this.places.set(part, [series.length]);
        series.push({ stroke, width: 1, fill: (u) => hatch(u.ctx, part.index), points: { show: false }, spanGaps: false });
        continue;
      }
      const at = series.length;
      const dash = DASHES[part.index % DASHES.length];
      const edge = { stroke: () => fade(colour(part.shade), 0.6), width: 1, dash, points: { show: false }, spanGaps: false };
      bands.push({ series: [at, at + 1], fill: () => fade(colour(part.shade), 0.22) });
      series.push(edge, { ...edge }, { stroke, width: 1.6, dash, points: this.points(stroke), spanGaps: false });
      this.places.set(part, [at, at + 1, at + 2]);
    }
    this.u = new uPlot(
      {
        width: this.width(),
        height: this.height(),
        padding: PADDING,
        series,
        bands,
        axes: axes(this.spec, markSeconds),
        scales: { x: { time: false, range: () => [view.from, view.to] }, y: verticalScale(this.spec) },
        legend: { show: false },
        cursor: {
          y: false,
          points: { show: false },
          drag: { x: true, y: false, setScale: false, dist: 6 },
          sync: { key: "time", scales: ["x", null], setSeries: false },
          bind: { dblclick: () => () => setView(view.first, view.last) },
        },
        hooks: { setSelect: [(u) => this.selected(u)] },
      },
      [[], ...series.slice(1).map(() => [])],
      this.plot,
    );
  }

  // Values that only some steps have are dots.
  points(stroke) {
    return this.spec.dots ? { show: true, size: 5, stroke, fill: stroke } : { show: false };
  }

  width() {
    return Math.max(200, this.plot.clientWidth);
  }

  height() {
    return this.spec.kind === "stack" ? 190 : 170;
  }

  resize() {
    if (Math.abs(this.width() - this.u.width) < 1) return;
    this.u.setSize({ width: this.width(), height: this.height() });
    this.stale = true;
    drawVisible();
  }

  show(part, shown) {
    part.hidden = !shown;
    this.stale = true;
    drawVisible();
  }

  update() {
    const { xs, columns } = sampled(this.parts, this.u.bbox.width / (devicePixelRatio || 1));
    const data = new Array(this.u.series.length);
    data[0] = xs;
    let below = null;
    this.parts.forEach((part, p) => {
      const places = this.places.get(part);
      if (this.spec.kind === "stack") {
        const values = part.hidden ? columns[p][0].map(() => 0) : columns[p][0];
        below = values.map((v, i) => (v == null ? v : v + (below ? below[i] || 0 : 0)));
        data[places[0]] = part.hidden ? xs.map(() => undefined) : below;
      } else {
        const nothing = part.hidden ? xs.map(() => undefined) : null;
        data[places[0]] = nothing || columns[p][2];
        data[places[1]] = nothing || columns[p][1];
        data[places[2]] = nothing || columns[p][0];
      }
    });
    this.shown = columns;
    this.u.setData(data);
  }

  selected(u) {
    if (u.select.width < 6) return;
    const from = u.posToVal(u.select.left, "x"), to = u.posToVal(u.select.left + u.select.width, "x");
    u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
    setView(from, to);
  }

  hover(t) {
    this.parts.forEach((part, p) => {
      this.values[p].textContent = t === null ? "" : this.valueAt(part, t);
    });
  }

  valueAt({ line, curve }, t) {
    const i = bucketAt(line, t), format = FORMATS[this.spec.unit];
    if (i < 0) return "";
    const text = format(curve.mean[i]);
    return curve.banded && curve.low[i] < curve.high[i] ? `${text} (${format(curve.low[i])} to ${format(curve.high[i])})` : text;
  }

  repaint() {
    this.u.redraw(false, true);
  }
}

function fade(hex, alpha) {
  const [r, g, b] = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  return `rgba(${r}, ${g}, ${b}, ${alpha})`;
}

// Lines of all runs in one chart; of a stack a chart for each line.
function timeCharts(spec, place) {
  const lines = page.lines.filter((line) => line.source === spec.source && spec.series.some(([key]) => line.curves[key]));
  const keys = spec.series.filter(([key]) => lines.some((line) => line.curves[key]));
  if (spec.kind === "stack") {
    for (const line of lines) {
      const parts = keys
        .filter(([key]) => line.curves[key])
        .map(([key, text]) => ({ line, key, text, curve: line.curves[key], index: placeIn(spec, key), shade: placeIn(spec, key) }));
      const inner = element("div", { class: "inner" });
      place.append(inner);
      page.charts.push(new TimeChart(spec, [spec.title, nameOf(line)].filter(Boolean).join(": "), parts, inner));
    }
    return;
  }
  const parts = [];
  lines.forEach((line, l) => {
    keys.forEach(([key, text], k) => {
      if (!line.curves[key]) return;
      const name = nameOf(line);
      parts.push({
        line,
        key,
        curve: line.curves[key],
        text: lines.length > 1 ? `${name}${keys.length > 1 ? `: ${text}` : ""}` : text,
        index: l * keys.length + k,
        shade: lines.length > 1 ? l : k,
      });
    });
  });
  if (parts.length) page.charts.push(new TimeChart(spec, spec.title, parts, place));
}

const placeIn = (spec, wanted) => spec.series.findIndex(([key]) => key === wanted);

// ---- charts that are not over time

// A distribution: for each latency the share of the values up to it.
class ShareChart {
  constructor(spec, place) {
    this.spec = spec;
    const parts = [];
    model.runs.forEach((run, r) =>
      spec.series.forEach(([key, text], k) => {
        if (!run.shares[key]) return;
        const [bounds, shares] = run.shares[key].map(arrayAt);
        const many = model.runs.length > 1;
        parts.push({ bounds, shares, text: many ? `${run.name}: ${text}` : text, index: r * spec.series.length + k, shade: many ? r : k });
      }),
    );
    if (!parts.length) return;
    const { legend, plot } = frame(spec, spec.title, place);
    const values = parts.map((part) =>
      legendEntry(legend, part.text, swatch(part.index, false, part.shade), (shown) => this.u.setSeries(parts.indexOf(part) + 1, { show: shown })),
    );
    const xs = Float64Array.from(new Set(parts.flatMap((part) => [...part.bounds]))).sort();
    const data = [Array.from(xs), ...parts.map((part) => Array.from(xs, (x) => shareAt(part, x)))];
    this.u = new uPlot(
      {
        width: Math.max(200, plot.clientWidth),
        height: 230,
        padding: PADDING,
        series: [{}, ...parts.map((part) => ({ stroke: () => colour(part.shade), width: 1.8, dash: DASHES[part.index % DASHES.length], points: { show: parts.length === 1 && xs.length === 1 } }))],
        axes: axes(spec, MARKS.s, true),
        scales: { x: { time: false, distr: 3 }, y: { range: [0, 1.02] } },
        legend: { show: false },
        cursor: { y: false, points: { show: false }, drag: { x: false, y: false } },
        hooks: {
          setCursor: [
            (u) => {
              const x = u.cursor.left < 0 ? null : u.posToVal(u.cursor.left, "x");
              parts.forEach((part, p) => {
                values[p].textContent = x === null ? "" : `${FORMATS.share(shareAt(part, x) ?? 0)} ≤ ${inSeconds(x)}`;
              });
            },
          ],
        },
      },
      data,
      plot,
    );
    new ResizeObserver(() => this.u.setSize({ width: Math.max(200, plot.clientWidth), height: 230 })).observe(plot);
    page.charts.push(this);
  }

  repaint() {
    this.u.redraw(false, true);
  }
}

function shareAt({ bounds, shares }, x) {
  const i = placeOf(bounds, x, true) - 1;
  if (i < 0) return 0;
  if (i === bounds.length - 1) return shares[i];
  const part = (Math.log(x) - Math.log(bounds[i])) / (Math.log(bounds[i + 1]) - Math.log(bounds[i]));
  return shares[i] + (shares[i + 1] - shares[i]) * part;
}

// A point for each request, at the moment it ended.
class PointChart {
  constructor(spec, place) {
    this.spec = spec;
    this.element = place;
    this.runs = page.requests.filter((r) => r.ended.length);
    if (!this.runs.length) return;
    const { legend, plot } = frame(spec, spec.title, place);
    this.plot = plot;
    this.runs.forEach((r) =>
      legendEntry(legend, model.runs.length > 1 ? model.runs[r.run].name : "a request", marker(r.run), (shown) => {
        r.hidden = !shown;
        this.update();
      }),
    );
    this.u = new uPlot(
      {
        width: Math.max(200, plot.clientWidth),
        height: 170,
        padding: PADDING,
        series: [
          {},
          ...this.runs.map((r) => ({
            stroke: () => colour(r.run),
            paths: () => null,
            points: { show: true, size: 6 - (r.run % 3), fill: () => (r.run % 2 ? style("--page") : colour(r.run)), width: 1.2 },
          })),
        ],
        axes: axes(spec, markSeconds),
        scales: { x: { time: false, range: () => [view.from, view.to] }, y: verticalScale(spec) },
        legend: { show: false },
        cursor: {
          y: false,
          points: { show: false },
          drag: { x: true, y: false, setScale: false, dist: 6 },
          sync: { key: "time", scales: ["x", null], setSeries: false },
          bind: { dblclick: () => () => setView(view.first, view.last) },
        },
        hooks: { setSelect: [TimeChart.prototype.selected] },
      },
      [[], ...this.runs.map(() => [])],
      plot,
    );
    register(this);
    timeMouse(this.u.over, (event) => timeUnder(this.u, event));
    new ResizeObserver(() => {
      this.u.setSize({ width: Math.max(200, plot.clientWidth), height: 170 });
      this.stale = true;
      drawVisible();
    }).observe(plot);
    page.charts.push(this);
  }

  update() {
    const xs = [], rows = [];
    this.runs.forEach((r, k) => {
      if (r.hidden) return;
      for (let i = 0; i < r.ended.length; i++) {
        const took = r.ended[i] - r.arrived[i];
        if (r.ended[i] >= view.from && r.ended[i] <= view.to && took > 0) rows.push([r.ended[i], k, took]);
      }
    });
    rows.sort((a, b) => a[0] - b[0]);
    const columns = this.runs.map(() => []);
    for (const [x, k, took] of rows) {
      xs.push(x);
      columns.forEach((column, c) => column.push(c === k ? took : undefined));
    }
    this.u.setData([xs, ...columns]);
  }

  hover() {}

  repaint() {
    this.u.redraw(false, true);
  }
}

function marker(i) {
  const canvas = swatch(i, false);
  canvas.paint = () => {
    const c = canvas.getContext("2d"), ratio = devicePixelRatio || 1;
    c.clearRect(0, 0, canvas.width, canvas.height);
    c.beginPath();
    c.arc(canvas.width / 2, canvas.height / 2, 3.5 * ratio, 0, 7);
    c.fillStyle = c.strokeStyle = colour(i);
    c.lineWidth = 1.4 * ratio;
    if (i % 2 === 0) c.fill();
    c.stroke();
  };
  canvas.paint();
  return canvas;
}
