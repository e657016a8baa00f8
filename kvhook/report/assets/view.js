// The time that all charts show, and the moment that the mouse is over. Who draws time registers here.

const view = { from: 0, to: 1, first: 0, last: 1, moment: null };
const viewers = []; // objects with update() and hover(t), and an element
const MARGIN = 0.005;
let waiting = false;

function setLimits(lines, requests) {
  let first = Infinity, last = -Infinity;
  for (const line of lines) {
    if (!line.begin.length) continue;
    first = Math.min(first, line.begin[0]);
    last = Math.max(last, line.end[line.end.length - 1]);
  }
  for (const r of requests) {
    for (const t of r.arrived) if (t < first) first = t;
    for (const t of r.ended) if (t > last) last = t;
  }
  if (!(last > first)) [first, last] = Number.isFinite(first) ? [first - 0.5, first + 0.5] : [0, 1];
  const margin = MARGIN * (last - first);
  view.first = view.from = first - margin;
  view.last = view.to = last + margin;
}

function setView(from, to) {
  const whole = view.last - view.first;
  const width = Math.min(Math.max(to - from, 1e-6), whole);
  from = Math.min(Math.max(from, view.first), view.last - width);
  view.from = from;
  view.to = from + width;
  redraw();
}

function redraw() {
  for (const viewer of viewers) viewer.stale = true;
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    drawVisible();
    sayRange();
  });
}

// What is not on the screen is drawn when it comes there.
function drawVisible() {
  for (const viewer of viewers) {
    if (viewer.stale && viewer.onScreen) {
      viewer.stale = false;
      viewer.update();
    }
  }
}

const watcher = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) entry.target.viewer.onScreen = entry.isIntersecting;
    drawVisible();
  },
  { rootMargin: "200px" },
);

function register(viewer) {
  viewer.stale = true;
  viewer.onScreen = false;
  viewer.element.viewer = viewer;
  viewers.push(viewer);
  watcher.observe(viewer.element);
}

function zoom(factor, at = (view.from + view.to) / 2) {
  setView(at - (at - view.from) * factor, at + (view.to - at) * factor);
}

function pan(share) {
  const by = share * (view.to - view.from);
  setView(view.from + by, view.to + by);
}

function hover(t) {
  view.moment = t;
  for (const viewer of viewers) if (viewer.onScreen) viewer.hover(t);
  sayMoment(t);
}

function sayRange() {
  const [from, to] = [Math.max(view.from, 0), view.to];
  const whole = view.from <= view.first && view.to >= view.last;
  document.getElementById("range").textContent = whole
    ? `all ${inSeconds(view.last - view.first)}`
    : `${exact(from)} to ${exact(to)} s`;
}

// Enough digits to tell the two ends of the view apart.
function exact(t) {
  const places = Math.min(9, Math.max(1, 2 - Math.floor(Math.log10(view.to - view.from))));
  return t.toFixed(places);
}

function sayMoment(t) {
  const element = document.getElementById("moment");
  if (t === null) return void (element.textContent = "");
  const texts = [`${exact(t)} s`];
  const one = model.runs.length === 1 ? model.runs[0] : null;
  if (one && one.wall) texts.push(new Date(one.wall + 1000 * t).toISOString().replace("T", " ").slice(0, 23) + " UTC");
  const steps = page.lines.filter((line) => line.source === "steps");
  if (steps.length === 1) texts.push(stepsAt(steps[0], t));
  element.textContent = texts.filter(Boolean).join(" · ");
}

function stepsAt(line, t) {
  const i = bucketAt(line, t);
  if (i < 0) return "";
  const first = line.first + i * line.size;
  const last = line.first + Math.min((i + 1) * line.size, line.steps) - 1;
  return first === last ? `step ${first.toLocaleString("en")}` : `steps ${first.toLocaleString("en")}–${last.toLocaleString("en")}`;
}

// Mouse on anything that shows time: what it points at, with Shift a drag moves, and the wheel zooms.
function timeMouse(element, timeOf) {
  element.addEventListener("mousemove", (event) => hover(timeOf(event)));
  element.addEventListener("mouseleave", () => hover(null));
  element.addEventListener(
    "wheel",
    (event) => {
      if (!event.shiftKey) return;
      event.preventDefault();
      const turned = event.deltaY || event.deltaX;
      zoom(turned > 0 ? 1.25 : 0.8, timeOf(event));
    },
    { passive: false },
  );
  element.addEventListener(
    "mousedown",
    (event) => {
      if (!event.shiftKey || event.button) return;
      event.preventDefault();
      event.stopImmediatePropagation();
      const [from, to, x, width] = [view.from, view.to, event.clientX, element.clientWidth];
      const move = (e) => {
        const by = ((x - e.clientX) / width) * (to - from);
        setView(from + by, to + by);
      };
      const up = () => {
        removeEventListener("mousemove", move);
        removeEventListener("mouseup", up);
      };
      addEventListener("mousemove", move);
      addEventListener("mouseup", up);
    },
    { capture: true },
  );
}
