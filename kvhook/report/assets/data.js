// The page's data: the model as JSON, and arrays in one compressed block.

const model = JSON.parse(document.getElementById("model").textContent);
let buffer = null;

async function loadData() {
  const text = atob(document.getElementById("data").textContent);
  const packed = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) packed[i] = text.charCodeAt(i);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  buffer = await new Response(stream).arrayBuffer();
  document.getElementById("data").remove();
}

const TYPES = { f4: Float32Array, f8: Float64Array, i4: Int32Array };

function arrayAt([offset, count, type]) {
  return new TYPES[type](buffer, offset, count);
}

// A line with its arrays: begin and end of each bucket, and for each curve its mean and, if there is one, its band.
function unpackLine(run, line) {
  const curves = {};
  for (const [name, parts] of Object.entries(line.curves)) {
    const [mean, low, high] = parts.map(arrayAt);
    curves[name] = { mean, low: low || mean, high: high || mean, banded: parts.length > 1 };
  }
  return { ...line, run, begin: arrayAt(line.begin), end: arrayAt(line.end), curves };
}

// The first place in a sorted array whose value is not below x; or, with `after`, that is above x.
function placeOf(sorted, x, after = false) {
  let low = 0, high = sorted.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < x || (after && sorted[middle] === x)) low = middle + 1;
    else high = middle;
  }
  return low;
}

// The bucket that a moment falls into, or the last one before it; -1 before the first.
function bucketAt(line, t) {
  return placeOf(line.begin, t, true) - 1;
}

// ---- numbers as text

function inSeconds(value) {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0 s";
  if (size < 0.9995e-3) return `${digits(value * 1e6)} µs`;
  if (size < 0.9995) return `${digits(value * 1e3)} ms`;
  return size < 600 ? `${digits(value)} s` : `${Math.round(value).toLocaleString("en")} s`;
}

function digits(value) {
  return Number(value.toPrecision(3)).toString();
}

const FORMATS = {
  share: (value) => (Number.isFinite(value) ? `${(100 * value).toFixed(1)} %` : "–"),
  count: (value) => {
    if (!Number.isFinite(value)) return "–";
    return Number.isInteger(value) || Math.abs(value) >= 100 ? Math.round(value).toLocaleString("en") : digits(value);
  },
  s: inSeconds,
};

// Marks of an axis.
const MARKS = {
  share: (value) => (value == null ? "" : `${+(100 * value).toFixed(2)}%`),
  count: (value) => (value == null ? "" : Math.abs(value) >= 10000 ? `${+(value / 1000).toFixed(1)}k` : `${+value.toFixed(3)}`),
  s: (value) => (value == null ? "" : inSeconds(value)),
};
