// What the view shows of some lines, on one common axis of x.

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
