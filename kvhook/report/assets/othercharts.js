// Charts of single values: distributions, and a point for each request.

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
        width: plotWidth(plot),
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
    keepWidth(this.u, plot);
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
    this.runs.forEach((r) =>
      legendEntry(legend, model.runs.length > 1 ? model.runs[r.run].name : "a request", marker(r.run), (shown) => {
        r.hidden = !shown;
        this.update();
      }),
    );
    this.u = timePlot(this, plot, 170, {
      series: [
        {},
        ...this.runs.map((r) => ({
          stroke: () => colour(r.run),
          paths: () => null,
          points: { show: true, size: 6 - (r.run % 3), fill: () => (r.run % 2 ? style("--page") : colour(r.run)), width: 1.2 },
        })),
      ],
    });
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
    c.setLineDash([]); // the swatch that this was had dashes
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
