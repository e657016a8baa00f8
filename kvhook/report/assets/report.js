// Puts the page together.

const page = { lines: [], requests: [], charts: [], marks: [] };

function says(place, text, run) {
  const name = model.runs.length > 1 ? `${model.runs[run].name}: ` : "";
  place.append(element("p", { class: "absent" }, `${name}${text}`));
}

function draw(spec) {
  const place = document.getElementById(`chart-${spec.id}`);
  if (spec.kind === "shares") new ShareChart(spec, place);
  else if (spec.kind === "points") new PointChart(spec, place);
  else timeCharts(spec, place);
  if (!place.querySelector("h3")) place.append(element("h3", {}, spec.title));
  spec.empty.forEach((why, run) => why && says(place, why, run));
}

const ACTIONS = {
  left: () => pan(-0.25),
  right: () => pan(0.25),
  in: () => zoom(0.5),
  out: () => zoom(2),
  all: () => setView(view.first, view.last),
  help: () => document.getElementById("help").showModal(),
  theme: () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"),
};
const KEYS = { ArrowLeft: "left", ArrowRight: "right", "+": "in", "=": "in", "-": "out", 0: "all", Escape: "all", t: "theme", "?": "help" };

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  styles.clear();
  for (const canvas of document.querySelectorAll("canvas.swatch")) canvas.paint();
  for (const chart of page.charts) chart.repaint();
}

function listen() {
  for (const button of document.querySelectorAll("[data-do]")) button.addEventListener("click", ACTIONS[button.dataset.do]);
  addEventListener("keydown", (event) => {
    const action = KEYS[event.key];
    if (!action || event.ctrlKey || event.metaKey || event.altKey || document.getElementById("help").open) return;
    event.preventDefault();
    ACTIONS[action]();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", (event) => setTheme(event.matches ? "dark" : "light"));
}

async function start() {
  document.documentElement.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  await loadData();
  model.runs.forEach((run, r) => {
    page.lines.push(...run.lines.map((line) => unpackLine(r, line)));
    page.requests.push(unpackRequests(r, run.requests));
    page.marks.push(...run.marks);
  });
  page.marks.sort((a, b) => a[0] - b[0]);
  setLimits(page.lines, page.requests);
  model.charts.forEach(draw);
  const timeline = document.getElementById("timeline");
  page.requests.forEach((requests, r) => {
    if (requests.start.length) new RequestChart(requests, timeline);
    else says(timeline, model.charts.find((chart) => chart.kind === "points").empty[r] || "no request has ended", r);
  });
  listen();
  redraw();
  window.kvhookReport = { model, page, view, setView, sampled };
  document.documentElement.dataset.ready = "yes";
}

start().catch((error) => {
  const failed = document.getElementById("failed");
  failed.textContent = `The charts cannot be drawn: ${error.message}. They need a browser of 2023 or later.`;
  failed.hidden = false;
  throw error;
});
