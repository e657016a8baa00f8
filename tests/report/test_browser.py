"""Reports in a real browser, Debian's Chromium without a window: every chart draws, hover, zoom, keys and clicks work,
and nothing is complained about. Skipped where there is no Chromium; KVHOOK_CHROMIUM names one elsewhere."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kvhook
from kvhook.cli import main
from kvhook.report import buckets
from kvhook.report.charts import PARTS
from tests.ring.synthetic import Recording

playwright = pytest.importorskip("playwright.sync_api")

CHROMIUM = os.environ.get("KVHOOK_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: apt-get install chromium")

DATA = Path(__file__).parent / "data"
SIZES = {"desktop": (1440, 900), "tablet": (820, 1180), "phone": (390, 844)}
#: On a busy machine a page may take its time; it is waited for no longer than this, in ms.
PATIENCE = 90_000


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    # Chromium does not start without a home that it can write to
    environment = {**os.environ, "HOME": str(tmp_path_factory.mktemp("home"))}
    with playwright.sync_playwright() as p:
        # as root Chromium needs this; the pages are our own
        it = p.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"], timeout=PATIENCE, env=environment
        )
        yield it
        it.close()


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "report.html"
    assert main(["report", str(DATA / "baseline.kvh"), str(DATA / "grouped.kvh"), "-o", str(out)]) == 0
    return out


class Opened:
    """A report in the browser; at the end there may have been no error, and nothing may have been asked for."""

    def __init__(self, browser: Any, path: Path, size: str = "desktop", theme: str = "light") -> None:
        width, height = SIZES[size]
        self.context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=theme, offline=True
        )
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-ready=yes]")
        self.draw_all()

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.context.close()
        if kind is None:
            assert self.complaints == []
            assert [url for url in self.asked if not url.startswith(("file:", "data:"))] == []

    def draw_all(self) -> None:
        """Charts are drawn when they come onto the screen; here all of them are."""
        self.run("() => { for (const v of kvhookReport.page.charts) if (v.update) { v.onScreen = true; v.update(); } }")

    def run(self, script: str, *arguments: Any) -> Any:
        return self.page.evaluate(script, *arguments)

    def view(self) -> list[float]:
        found: list[float] = self.run("() => [kvhookReport.view.from, kvhookReport.view.to]")
        return found

    def wait_for_view(self, changed_from: list[float]) -> list[float]:
        self.page.wait_for_function(
            "([from, to]) => kvhookReport.view.from !== from || kvhookReport.view.to !== to", arg=changed_from
        )
        return self.view()

    def over(self, chart: str) -> Any:
        place = self.page.locator(f"#chart-{chart} .u-over").first
        place.scroll_into_view_if_needed()
        return place.bounding_box()


#: How many pixels of each canvas are not blank.
PAINTED = """(canvas) => {
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  let painted = 0;
  for (let i = 3; i < data.length; i += 4) painted += data[i] > 0;
  return painted;
}"""


@pytest.mark.parametrize(("size", "theme"), [("desktop", "light"), ("tablet", "dark"), ("phone", "light")])
def test_every_chart_draws_at_every_size(browser: Any, two_runs: Path, size: str, theme: str):
    with Opened(browser, two_runs, size, theme) as it:
        for part in PARTS:
            for chart in part.charts:
                canvases = it.page.locator(f"#chart-{chart.id} .plot canvas").all()
                assert len(canvases) == (2 if chart.kind == "stack" else 1), chart.id
                assert all(canvas.evaluate(PAINTED) > 400 for canvas in canvases), chart.id
        assert [c.evaluate(PAINTED) > 400 for c in it.page.locator("#timeline .plot canvas").all()] == [True, True]
        # nothing sticks out to the side
        assert it.run("() => document.documentElement.scrollWidth") == SIZES[size][0]
        assert it.run("() => document.documentElement.dataset.theme") == theme


def test_the_mouse_shows_the_values_of_all_charts_at_one_moment(browser: Any, two_runs: Path):
    with Opened(browser, two_runs) as it:
        box = it.over("usage")
        it.page.mouse.move(box["x"] + box["width"] / 4, box["y"] + 40)
        it.page.wait_for_function("() => document.querySelector('#chart-usage .value').textContent !== ''")
        t = it.run("() => kvhookReport.view.moment")
        trace = kvhook.open(DATA / "baseline.kvh")
        begin = min(trace.steps()["t_start_ns"][0], trace.cores().steps()["t_schedule_ns"][0]) / 1e9
        steps = trace.steps()
        row = steps[(steps["t_start_ns"] / 1e9 - begin) <= t][-1]
        shown = it.page.locator("#chart-usage .value").first.text_content()
        assert shown == f"{100 * row['kv_cache_usage']:.1f} %"
        box = it.over("queue")
        it.page.mouse.move(box["x"] + box["width"] / 4, box["y"] + 40)
        it.page.wait_for_function("() => document.querySelector('#chart-queue .value').textContent !== ''")
        assert it.page.locator("#chart-queue .value").first.text_content() == str(row["num_running_reqs"])


def test_zoom_and_pan_by_mouse_keys_and_buttons_are_shared_by_all(browser: Any, two_runs: Path):
    with Opened(browser, two_runs) as it:
        whole = it.view()
        box = it.over("queue")
        y = box["y"] + 50
        it.page.mouse.move(box["x"] + 0.25 * box["width"], y)
        it.page.mouse.down()
        it.page.mouse.move(box["x"] + 0.5 * box["width"], y, steps=4)
        it.page.mouse.up()
        zoomed = it.wait_for_view(whole)
        width = whole[1] - whole[0]
        assert zoomed == pytest.approx([whole[0] + 0.25 * width, whole[0] + 0.5 * width], abs=0.01 * width)
        scales = it.run(
            """async () => {
              const charts = kvhookReport.page.charts.filter((c) => c.parts);
              charts.forEach((c) => c.update());
              await new Promise((done) => setTimeout(done));
              return charts.map((c) => [c.u.scales.x.min, c.u.scales.x.max]);
            }"""
        )
        assert len(scales) > 8
        assert all(scale == pytest.approx(zoomed) for scale in scales)
        it.page.keyboard.press("ArrowRight")
        moved = it.wait_for_view(zoomed)
        assert moved[0] == pytest.approx(zoomed[0] + 0.25 * (zoomed[1] - zoomed[0]))
        it.page.keyboard.press("+")
        closer = it.wait_for_view(moved)
        assert closer[1] - closer[0] == pytest.approx((moved[1] - moved[0]) / 2)
        it.page.click("[data-do=out]")
        assert it.wait_for_view(closer) == pytest.approx(moved)
        it.page.keyboard.press("0")
        assert it.wait_for_view(moved) == pytest.approx(whole)


def test_a_click_on_a_request_shows_its_numbers(browser: Any, two_runs: Path):
    with Opened(browser, two_runs) as it:
        canvas = it.page.locator("#timeline .plot canvas").first
        canvas.scroll_into_view_if_needed()
        at = it.run(
            """() => {
              const chart = kvhookReport.page.charts.find((c) => c.r);
              const i = 7, [x, y, w, h] = chart.box(i, chart.r.start[i], chart.r.ended[i]);
              return { i, x: x + w / 2, y: y + h / 2, request: chart.r.request[i] };
            }"""
        )
        canvas.click(position={"x": at["x"], "y": at["y"]})
        numbers = it.page.locator("#timeline .numbers").first
        numbers.locator("table").wait_for()
        row = kvhook.open(DATA / "baseline.kvh").cores().requests()
        row = row[row["request"] == at["request"]][0]
        text = numbers.inner_text()
        assert f"prompt tokens\n{row['num_prompt_tokens']}" in text.replace("\t", "\n")
        assert f"tokens generated\n{row['num_generation_tokens']}" in text.replace("\t", "\n")
        canvas.focus()
        it.page.keyboard.press("ArrowDown")
        assert it.run("() => kvhookReport.page.charts.find((c) => c.r).chosen") == at["i"] + 1


def test_a_line_can_be_hidden_and_the_colours_changed(browser: Any, two_runs: Path):
    with Opened(browser, two_runs) as it:
        entry = it.page.locator("#chart-usage button.entry").first
        before = it.page.locator("#chart-usage .plot canvas").first.evaluate(PAINTED)
        entry.click()
        assert entry.get_attribute("aria-pressed") == "false"
        it.draw_all()
        assert it.page.locator("#chart-usage .plot canvas").first.evaluate(PAINTED) < before
        it.page.keyboard.press("t")
        assert it.run("() => document.documentElement.dataset.theme") == "dark"
        assert it.run("() => getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 31)"


def test_a_peak_of_one_step_is_seen_at_every_zoom(browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # 1,500 steps in at most 128 buckets, as a long run is in its 32,768
    monkeypatch.setattr(buckets.Buckets.__init__, "__defaults__", (64,))
    recording = Recording(tmp_path / "rings", slots=2048)
    for step in range(1500):
        recording.step(0.9 if step == 777 else 0.1)
    out = tmp_path / "report.html"
    assert main(["report", str(recording.path), "-o", str(out)]) == 0
    with Opened(browser, out) as it:
        highest = it.run(
            """async () => {
              const chart = kvhookReport.page.charts.find((c) => c.spec.id === "usage"), line = chart.parts[0].line;
              const at = line.end[line.end.length - 1] * 777.5 / 1500, whole = line.end[line.end.length - 1];
              const found = [];
              for (let width = 1; width > 0.0005; width *= 0.7) {
                for (const shift of [-0.45, -0.2, 0, 0.3, 0.45]) {
                  const from = at + (shift - 0.5) * width * whole;
                  kvhookReport.setView(from, from + width * whole);
                  chart.update();
                  await new Promise((done) => setTimeout(done));
                  const high = chart.u.data[chart.places.get(chart.parts[0])[0]];
                  found.push([width, Math.max(...high.filter((v) => v != null)), chart.u.scales.y.max]);
                }
              }
              return found;
            }"""
        )
        assert len(highest) > 80
        assert [seen for seen in highest if seen[1] != pytest.approx(0.9, rel=1e-6) or seen[2] <= 0.9] == []


def test_names_with_html_in_them_stay_text(browser: Any, tmp_path: Path):
    hostile = "</script><script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\">"
    recording = Recording(tmp_path / "rings", model=hostile)
    recording.run(3)
    trace = kvhook.open(recording.path)
    from kvhook.report.page import page
    from kvhook.report.runs import read

    out = tmp_path / "report.html"
    out.write_text(page([read(trace, trace.cores(), name) for name in (hostile, "other")], "0"), encoding="utf-8")
    with Opened(browser, out) as it:
        assert it.page.title() != "broken"
        assert it.page.locator("img").count() == 0
        assert hostile in it.page.locator("h1").text_content()


def test_an_empty_run_opens_and_says_so(browser: Any, tmp_path: Path):
    out = tmp_path / "report.html"
    assert main(["report", str(Recording(tmp_path / "rings").path), "-o", str(out)]) == 0
    with Opened(browser, out) as it:
        assert it.page.locator("#chart-usage .absent").count() == 1
        assert it.page.locator(".plot canvas").count() == 0
