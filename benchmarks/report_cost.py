"""What a report costs: processor time and memory of `kvhook report`, size of the page, and how long Chromium takes to
open it, by length of the run.

The traces are made up, like those of `analysis_cost.py`, each with the file of an engine core beside it.

    python benchmarks/report_cost.py                       # 1e5 and 1e6 steps
    python benchmarks/report_cost.py --steps 1e7           # 10 GB in the temporary folder meanwhile
    python benchmarks/report_cost.py --no-browser --no-core

The browser is Debian's Chromium without a window (KVHOOK_CHROMIUM names another one), driven by Playwright. "Opened" is
from the request to the moment that the page says it is ready, with the charts on the screen drawn; "all drawn" until
every chart of the page has drawn itself as well; "a move" is a move along the run with the keys, until it is drawn. Of
the times to open the fastest of seven tries counts.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from analysis_cost import BLOCK_SIZE, BLOCKS, PIECE, append, make_trace

from kvhook.core_schema import CORE_KINDS
from kvhook.ring.layout import Layout, make_layout
from kvhook.ring.slots import fields_of, slot_head
from kvhook.ring.trace_file import TraceWriter


def make_core(trace: Path, steps: int, seed: int = 1) -> Path:
    """The file of an engine core beside a trace: steps of the same times, a look-up and a request in every 8th of them,
    a preemption in every 1000th."""
    rng = np.random.default_rng(seed)
    layout = make_layout({}, CORE_KINDS)
    meta = {
        "engine": 0,
        "stream": "core",
        "kvhook": "0.2.0",
        "vllm": "0.32.0",
        "model": "made-up",
        "pid": os.getpid(),
        "parent": os.getpid(),
        "core_level": "steps",
        "block_size": BLOCK_SIZE,
        "num_kv_blocks": BLOCKS,
        "max_num_seqs": 64,
        "absent": {"core_step": {}},
    }
    path = trace.with_name(f"{trace.stem}.core0-{os.getpid()}.kvh")
    writer = TraceWriter(path, layout, meta)
    writer.append_meta(0, meta)
    clock, n = 10**12, 0
    for first in range(0, steps, PIECE):
        piece, clock = _core_piece(layout, rng, np.arange(first, min(first + PIECE, steps)), clock)
        n = append(writer, piece, n)
    writer.append_meta(0, {"records_published": n})
    writer.close()
    return path


def _core_piece(layout: Layout, rng: np.random.Generator, step: np.ndarray, clock: int) -> tuple[np.ndarray, int]:
    took = (2e6 + 3e5 * rng.exponential(size=len(step))).astype(np.int64)
    ends = clock + np.cumsum(took + 20_000)
    running = np.clip(40 + 24 * np.sin(step / 3000) + rng.integers(-3, 4, len(step)), 0, 64).astype(np.int64)
    used = np.clip(running * 120 + rng.integers(0, 400, len(step)), 0, BLOCKS)
    cached = ((BLOCKS - used) * 0.6).astype(np.int64)
    steps = {
        "step": step,
        "t_schedule_ns": ends - took,
        "t_scheduled_ns": ends - took + 100_000,
        "t_update_ns": ends - 50_000,
        "t_end_ns": ends,
        "num_scheduled_tokens": running + 100 * (step % 8 == 0),
        "num_prefill_tokens": 100 * (step % 8 == 0),
        "num_decode_tokens": running,
        "num_running_reqs": running,
        "limited_by": rng.integers(0, 4, len(step)),
        "num_kv_blocks": BLOCKS,
        "num_kv_blocks_peak": used,
        "num_kv_blocks_used": used,
        "num_kv_blocks_cached": cached,
        "num_kv_blocks_empty": BLOCKS - used - cached,
        "kvhook_ns": 4000,
    }
    of, rare = step % 8 == 0, step % 1000 == 999
    numbers = {"request": step[of] // 8, "request_id": step[of] // 8}
    lookups = {**numbers, "step": step[of], "t_ns": (ends - took)[of], "num_tries": 1, "num_tokens": 200}
    requests = {
        **numbers,
        "finish_reason": 1,
        "finished_step": step[of],
        "t_arrived_ns": ends[of] - 10**9,
        "t_first_scheduled_ns": ends[of] - 9 * 10**8,
        "t_first_token_ns": ends[of] - 8 * 10**8,
        "t_finished_ns": ends[of],
        "num_prompt_tokens": 200,
        "num_cached_tokens": 64,
        "num_generation_tokens": 300,
    }
    preemptions = {"step": step[rare], "request": step[rare] // 8, "t_ns": ends[rare] - 5 * 10**8, "ordinal": 1}
    tables = {"core_step": steps, "lookup": lookups, "core_request": requests, "preemption": preemptions}
    pieces = [_slots(layout, kind, columns) for kind, columns in tables.items()]
    order = np.argsort(
        np.concatenate([columns["step" if "step" in columns else "finished_step"] for columns in tables.values()]),
        kind="stable",
    )
    return np.concatenate(pieces)[order], int(ends[-1])


def _slots(layout: Layout, kind: str, columns: dict) -> np.ndarray:
    count = len(columns["step" if "step" in columns else "finished_step"])
    slots = np.zeros((count, layout.slot_bytes), np.uint8)
    slot_head(slots)["kind"] = CORE_KINDS[kind][0]
    fields = fields_of(slots, layout.columns[kind])
    for column in layout.columns[kind]:
        fields[column.name] = columns.get(column.name, 0)
    return slots


class Cost(NamedTuple):
    """What one `kvhook report` took."""

    seconds: float
    cpu: float
    peak_mb: float
    file_mb: float


def measure(trace: Path, page: Path) -> Cost:
    """Run `kvhook report` once."""
    page.unlink(missing_ok=True)
    began = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", "kvhook", "report", trace, "-o", page], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"kvhook report failed with {child.returncode}")
    took = time.perf_counter() - began
    return Cost(took, used.ru_utime + used.ru_stime, used.ru_maxrss / 1e3, page.stat().st_size / 1e6)


DRAW_ALL = "() => { for (const v of kvhookReport.page.charts) if (v.update) { v.onScreen = true; v.update(); } }"
#: Shows a quarter of the run and moves along; gives the milliseconds that each move took until it was drawn.
PAN = """async () => {
  const { view, setView } = kvhookReport, frame = () => new Promise(requestAnimationFrame), took = [];
  const [first, width] = [view.from, (view.to - view.from) / 4];
  for (let i = 0; i < 60; i++) {
    const began = performance.now();
    setView(first + (width * i) / 20, first + (width * i) / 20 + width);
    await frame();
    await frame();
    took.push(performance.now() - began);
  }
  return took.sort((a, b) => a - b)[30];
}"""


class Opened(NamedTuple):
    """How fast a page was: seconds until it is ready and until every chart has drawn, milliseconds of a move."""

    ready: float
    drawn: float
    move_ms: float


def opened(page_file: Path, times: int = 7) -> Opened:
    """The fastest of some tries, each in a fresh context of the browser."""
    from playwright.sync_api import sync_playwright

    chromium = os.environ.get("KVHOOK_CHROMIUM") or shutil.which("chromium")
    tries, move_ms = [], 0.0
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for _ in range(times):
            context = browser.new_context(viewport={"width": 1440, "height": 900}, offline=True)
            page = context.new_page()
            page.set_default_timeout(120_000)
            began = time.perf_counter()
            page.goto(page_file.resolve().as_uri())
            page.wait_for_selector("html[data-ready=yes]")
            ready = time.perf_counter() - began
            page.evaluate(DRAW_ALL)
            tries.append((ready, time.perf_counter() - began))
            if not move_ms:  # as somebody sees it: only the charts on the screen are drawn
                page.reload()
                page.wait_for_selector("html[data-ready=yes]")
                page.evaluate("() => document.getElementById('batch').scrollIntoView()")
                move_ms = page.evaluate(PAN)
            context.close()
        browser.close()
    return Opened(*(min(column) for column in zip(*tries, strict=True)), move_ms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", type=float, default=[1e5, 1e6])
    parser.add_argument("--no-core", action="store_true", help="without the file of an engine core")
    parser.add_argument("--no-browser", action="store_true", help="do not open the page")
    args = parser.parse_args()
    heads = (
        "steps",
        "traces MB",
        "seconds",
        "CPU seconds",
        "peak MB",
        "page MB",
        "opened s",
        "all drawn s",
        "a move ms",
    )
    print(f"| {' | '.join(heads)} |\n|{' ---: |' * len(heads)}", flush=True)
    for steps in map(int, args.steps):
        with tempfile.TemporaryDirectory() as folder:
            trace, page = Path(folder) / "run.kvh", Path(folder) / "report.html"
            make_trace(trace, steps)
            if not args.no_core:
                make_core(trace, steps)
            size = sum(file.stat().st_size for file in Path(folder).iterdir()) / 1e6
            cost = measure(trace, page)
            shown = ("", "", "")
            if not args.no_browser:
                found = opened(page)
                shown = (f"{found.ready:.2f}", f"{found.drawn:.2f}", f"{found.move_ms:.0f}")
            cells = (f"{cost.seconds:.1f}", f"{cost.cpu:.1f}", f"{cost.peak_mb:.0f}", f"{cost.file_mb:.1f}", *shown)
            print(f"| {steps:,} | {size:,.0f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
