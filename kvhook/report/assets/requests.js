// The request timeline: a bar for each request, in as many rows as there were requests at once. A click shows its numbers.

const ROW = { least: 3, most: 15, gap: 1 };
const TALLEST = 460;

function unpackRequests(run, r) {
  const plain = ["count", "core", "reasons", "spans"];
  const arrays = Object.fromEntries(Object.entries(r).filter(([name]) => !plain.includes(name)).map(([name, place]) => [name, arrayAt(place)]));
  const [row, begin, end] = r.spans.map(arrayAt);
  const requests = { ...r, ...arrays, run, spans: { row, begin, end } };
  requests.start = Float64Array.from(requests.ended, (end, i) => (Number.isNaN(requests.arrived[i]) ? end : requests.arrived[i]));
  requests.rows = rowsOf(requests.start, requests.ended);
  return requests;
}

// Each request goes into the first row that is free.
function rowsOf(start, end) {
  const free = [];
  const rows = new Int32Array(start.length);
  for (let i = 0; i < start.length; i++) {
    let row = free.findIndex((until) => until <= start[i]);
    if (row < 0) row = free.length;
    free[row] = end[i];
    rows[i] = row;
  }
  return { of: rows, count: free.length };
}

// How much of the prompt came from the cache: from dark (nothing) to light (all). Not known: the quiet colour.
function shareColour(share) {
  if (!(share >= 0)) return style("--quiet");
  const [from, to] = [style("--uncached"), style("--cached")].map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));
  return `rgb(${from.map((c, i) => Math.round(c + (to[i] - c) * Math.min(1, share))).join(",")})`;
}

class RequestChart {
  constructor(requests, place) {
    this.r = requests;
    this.element = element("div", { class: "inner requests" });
    const run = model.runs[requests.run];
    this.element.append(element("h3", {}, model.runs.length > 1 ? `Timeline: ${run.name}` : "Timeline"));
    this.element.append(element("p", { class: "explain" }, this.explain()));
    this.element.append(this.key());
    this.canvas = element("canvas", { tabindex: "0", role: "img", "aria-label": "Requests over time; the arrow keys go from one to the next" });
    this.numbers = element("div", { class: "numbers", "aria-live": "polite" }, "Click a request for its numbers.");
    this.element.append(element("div", { class: "plot" }, this.canvas), this.numbers);
    place.append(this.element);
    this.chosen = -1;
    register(this);
    timeMouse(this.canvas, (event) => this.timeAt(event));
    this.canvas.addEventListener("click", (event) => this.choose(this.under(event)));
    this.canvas.addEventListener("dblclick", () => setView(view.first, view.last));
    this.canvas.addEventListener("keydown", (event) => this.key_(event));
    this.dragToZoom();
    new ResizeObserver(() => {
      this.stale = true;
      drawVisible();
    }).observe(this.canvas.parentElement);
    page.charts.push(this);
  }

  explain() {
    const { count, start, core } = this.r;
    const some = start.length < count ? `${start.length.toLocaleString("en")} of ${count.toLocaleString("en")}: the slowest, and an even sample of the others. ` : "";
    return some + (core ? "As the engine core saw them." : "Reckoned from the step in which each ended and from vLLM's durations.");
  }

  key() {
    const entries = [
      ["queued", (c, w, h) => this.bar(c, "queued", 0, 0, w, h)],
      ["prefill, nothing cached", (c, w, h) => this.bar(c, "prefill", 0, 0, w, h, 0)],
      ["prefill, all cached", (c, w, h) => this.bar(c, "prefill", 0, 0, w, h, 1)],
      ["decode", (c, w, h) => this.bar(c, "decode", 0, 0, w, h, 0.5)],
      ["preempted", (c, w, h) => this.bar(c, "preempted", 0, 0, w, h)],
    ];
    const place = element("div", { class: "legend" });
    for (const [text, paint] of entries) {
      const mark = swatch(0, false), ratio = devicePixelRatio || 1;
      mark.paint = () => {
        const c = mark.getContext("2d");
        c.clearRect(0, 0, mark.width, mark.height);
        c.save();
        c.scale(ratio, ratio);
        paint(c, 30, 12);
        c.restore();
      };
      mark.paint();
      place.append(element("span", { class: "entry" }, mark, text));
    }
    return place;
  }

  bar(c, phase, x, y, width, height, share) {
    width = Math.max(width, 1);
    if (phase === "queued") {
      c.strokeStyle = style("--quiet");
      c.lineWidth = 1;
      c.beginPath();
      c.moveTo(x, y + height / 2);
      c.lineTo(x + width, y + height / 2);
      c.stroke();
      return;
    }
    if (phase === "preempted") {
      c.fillStyle = style("--page");
      c.fillRect(x, y, width, height);
      c.strokeStyle = style("--alarm");
      c.lineWidth = 1;
      c.setLineDash([2, 2]);
      c.strokeRect(x + 0.5, y + 0.5, width - 1, Math.max(1, height - 1));
      c.setLineDash([]);
      return;
    }
    c.fillStyle = shareColour(share);
    if (phase === "prefill") c.fillRect(x, y, width, height);
    else c.fillRect(x, y + height * 0.22, width, Math.max(1, height * 0.56));
    if (phase === "prefill" && height >= 5) {
      c.strokeStyle = style("--text");
      c.lineWidth = 0.8;
      c.strokeRect(x + 0.4, y + 0.4, width - 0.8, height - 0.8);
    }
  }

  height() {
    const rows = Math.max(1, this.r.rows.count);
    this.row = Math.min(ROW.most, Math.max(ROW.least, (TALLEST - 24) / rows));
    return Math.min(TALLEST, rows * this.row + 24);
  }

  update() {
    const [height, width, ratio] = [this.height(), Math.max(200, this.canvas.parentElement.clientWidth), devicePixelRatio || 1];
    this.canvas.style.height = `${height}px`;
    this.canvas.width = width * ratio;
    this.canvas.height = height * ratio;
    this.left = AXIS; // below the charts' own areas
    this.right = width - PADDING[1];
    const c = this.canvas.getContext("2d");
    c.scale(ratio, ratio);
    this.grid(c, width, height);
    c.save();
    c.beginPath();
    c.rect(this.left, 0, this.right - this.left, height - 22);
    c.clip();
    const { start, ended } = this.r;
    for (let i = 0; i < start.length; i++) if (ended[i] >= view.from && start[i] <= view.to) this.request(c, i);
    const { row, begin, end } = this.r.spans;
    for (let s = 0; s < row.length; s++) {
      if (end[s] >= view.from && begin[s] <= view.to) {
        const [x, y, width, height] = this.box(row[s], begin[s], end[s]);
        this.bar(c, "preempted", x, y, width, height);
      }
    }
    if (this.chosen >= 0) {
      const [x, y, width, height] = this.box(this.chosen, start[this.chosen], ended[this.chosen]);
      c.strokeStyle = style("--text");
      c.lineWidth = 2;
      c.strokeRect(x - 1, y - 1, width + 2, height + 2);
    }
    c.restore();
  }

  grid(c, width, height) {
    c.fillStyle = style("--quiet");
    c.strokeStyle = style("--grid");
    c.lineWidth = 1;
    c.font = "11px system-ui, sans-serif";
    c.textAlign = "center";
    const rough = ((view.to - view.from) / (this.right - this.left)) * 90;
    const unit = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((n) => n * unit).find((n) => n >= rough);
    for (let t = Math.ceil(view.from / step) * step; t <= view.to; t += step) {
      const x = Math.round(this.x(t)) + 0.5;
      c.beginPath();
      c.moveTo(x, 0);
      c.lineTo(x, height - 20);
      c.stroke();
      c.fillText(markSeconds(t), x, height - 6);
    }
  }

  x(t) {
    return this.left + ((t - view.from) / (view.to - view.from)) * (this.right - this.left);
  }

  box(i, begin, end) {
    const [from, to] = [Math.max(this.left - 5, this.x(begin)), Math.min(this.right + 5, this.x(end))];
    const gap = this.row > 4 ? ROW.gap : 0;
    const y = 2 + ((this.r.rows.of[i] * this.row) % Math.max(this.row, TALLEST - 26));
    return [from, y, Math.max(1, to - from), this.row - gap];
  }

  request(c, i) {
    const { arrived, scheduled, first_token, ended, num_cached_tokens, num_prompt_tokens, start } = this.r;
    const share = num_cached_tokens[i] >= 0 && num_prompt_tokens[i] > 0 ? num_cached_tokens[i] / num_prompt_tokens[i] : NaN;
    const moments = [["queued", arrived[i]], ["prefill", scheduled[i]], ["decode", first_token[i]]].filter(([, t]) => !Number.isNaN(t));
    if (!moments.length) moments.push(["decode", start[i]]);
    moments.forEach(([phase, t], k) => {
      const until = k + 1 < moments.length ? moments[k + 1][1] : ended[i];
      if (until >= view.from && t <= view.to) {
        const [x, y, width, height] = this.box(i, t, until);
        this.bar(c, phase, x, y, width, height, share);
      }
    });
  }

  timeAt(event) {
    const x = event.clientX - this.canvas.getBoundingClientRect().left;
    return view.from + ((x - this.left) / (this.right - this.left)) * (view.to - view.from);
  }

  // The request under the mouse; -1 if there is none.
  under(event) {
    const y = event.clientY - this.canvas.getBoundingClientRect().top, t = this.timeAt(event);
    const near = (3 / (this.right - this.left)) * (view.to - view.from);
    let found = -1;
    for (let i = 0; i < this.r.start.length; i++) {
      const [, top, , height] = this.box(i, this.r.start[i], this.r.ended[i]);
      if (y >= top && y <= top + height && t >= this.r.start[i] - near && t <= this.r.ended[i] + near) found = i;
    }
    return found;
  }

  choose(i) {
    this.chosen = i;
    this.numbers.replaceChildren(...(i < 0 ? ["Click a request for its numbers."] : [this.table(i)]));
    this.stale = true;
    drawVisible();
  }

  table(i) {
    const r = this.r, whole = (value) => (value >= 0 ? value.toLocaleString("en") : "not known");
    const took = (from, to) => (Number.isNaN(to - from) ? "not known" : inSeconds(to - from));
    const cached = r.num_cached_tokens[i], prompt = r.num_prompt_tokens[i];
    const share = cached >= 0 && prompt > 0 ? ` (${FORMATS.share(cached / prompt)})` : "";
    const rows = [
      ["request", whole(r.request[i])],
      ["vLLM's request id", r.request_id[i] >= 0 ? whole(r.request_id[i]) : "not a number"],
      ["arrived", `${exact(r.arrived[i])} s`],
      ["queued", took(r.arrived[i], r.scheduled[i])],
      ["prefill", took(r.scheduled[i], r.first_token[i])],
      ["time to first token", took(r.arrived[i], r.first_token[i])],
      ["decode", took(r.first_token[i], r.ended[i])],
      ["end to end", took(r.arrived[i], r.ended[i])],
      ["prompt tokens", whole(prompt)],
      ["of them cached", whole(cached) + share],
      ["tokens generated", whole(r.num_generation_tokens[i])],
      ["preemptions", whole(r.num_preemptions[i])],
      ["time preempted", Number.isNaN(r.preempted_time[i]) ? "not known" : inSeconds(r.preempted_time[i])],
      ["steps", r.first_step[i] >= 0 ? `${whole(r.first_step[i])} to ${whole(r.last_step[i])}` : `ended in ${whole(r.last_step[i])}`],
      ["ended by", r.reasons[r.reason[i]] || "not known"],
    ];
    return element("table", {}, ...rows.map(([name, text]) => element("tr", {}, element("th", { scope: "row" }, name), element("td", {}, text))));
  }

  key_(event) {
    const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!by || !this.r.start.length) return;
    event.preventDefault();
    event.stopPropagation();
    const next = Math.min(Math.max(this.chosen + by, 0), this.r.start.length - 1);
    if (this.r.ended[next] < view.from || this.r.start[next] > view.to) {
      const half = (view.to - view.from) / 2;
      setView(this.r.start[next] - half, this.r.start[next] + half);
    }
    this.choose(next);
  }

  dragToZoom() {
    this.canvas.addEventListener("mousedown", (event) => {
      if (event.button || event.shiftKey) return;
      const from = event.clientX;
      const t = this.timeAt(event);
      addEventListener("mouseup", (e) => Math.abs(e.clientX - from) > 6 && setView(Math.min(t, this.timeAt(e)), Math.max(t, this.timeAt(e))), { once: true });
    });
  }

  hover() {}

  repaint() {
    this.update();
  }
}
