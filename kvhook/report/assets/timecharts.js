// Lines and stacks over time, drawn by uPlot from what the view shows.

const plotWidth = (place) => Math.max(200, place.clientWidth);

// A plot over the time that all charts show: drags zoom, and the mouse points at one moment in all of them.
function timePlot(chart, place, height, options) {
  const u = new uPlot(
    {
      width: plotWidth(place),
      height,
      padding: PADDING,
      axes: axes(chart.spec, markSeconds),
      scales: { x: { time: false, range: () => [view.from, view.to] }, y: verticalScale(chart.spec) },
      legend: { show: false },
      cursor: {
        y: false,
        points: { show: false },
        drag: { x: true, y: false, setScale: false, dist: 6 },
        sync: { key: "time", scales: ["x", null], setSeries: false },
        bind: { dblclick: () => () => setView(view.first, view.last) },
      },
      ...options,
      hooks: { setSelect: [zoomToSelection], draw: [drawMarks] },
    },
    [[], ...options.series.slice(1).map(() => [])],
    place,
  );
  register(chart);
  timeMouse(u.over, (event) => timeUnder(u, event));
  keepWidth(u, place, () => {
    chart.stale = true;
    drawVisible();
  });
  return u;
}

// A plot is as wide as its place.
function keepWidth(u, place, changed = () => {}) {
  new ResizeObserver(() => {
    if (Math.abs(plotWidth(place) - u.width) < 1) return;
    u.setSize({ width: plotWidth(place), height: u.height });
    changed();
  }).observe(place);
}

function zoomToSelection(u) {
  if (u.select.width < 6) return;
  const from = u.posToVal(u.select.left, "x"), to = u.posToVal(u.select.left + u.select.width, "x");
  u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
  setView(from, to);
}

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
    this.u = timePlot(this, this.plot, stack ? 190 : 170, { series, bands });
  }

  // Values that only some steps have are dots.
  points(stroke) {
    return this.spec.dots ? { show: true, size: 5, stroke, fill: stroke } : { show: false };
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

// What was done to the engines, as upright lines; its text where there is room for it.
function drawMarks(u) {
  const c = u.ctx, ratio = devicePixelRatio || 1, { left, top, width, height } = u.bbox;
  c.save();
  c.strokeStyle = c.fillStyle = style("--quiet");
  c.lineWidth = ratio;
  c.setLineDash([3 * ratio, 3 * ratio]);
  c.font = `${10 * ratio}px system-ui, sans-serif`;
  c.textBaseline = "top";
  let free = left;
  for (const [time, text] of page.marks) {
    if (time < view.from || time > view.to) continue;
    const x = Math.round(u.valToPos(time, "x", true)) + 0.5;
    c.beginPath();
    c.moveTo(x, top);
    c.lineTo(x, top + height);
    c.stroke();
    const wide = c.measureText(text).width + 4 * ratio;
    if (x < free || x + wide > left + width) continue;
    c.fillText(text, x + 3 * ratio, top + 2 * ratio);
    free = x + wide;
  }
  c.restore();
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
