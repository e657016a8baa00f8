"""What analysis costs: time and peak memory of summaries, tables, exports and compression, by length of the run.

Each row is a process of its own, over a trace that this script makes: slots in the real format, written with numpy.

    python benchmarks/analysis_cost.py                       # 1e5 and 1e6 steps
    python benchmarks/analysis_cost.py --steps 1e7 --only summary live
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kvhook.ring.layout import FIELDS_AT, Layout, make_layout
from kvhook.ring.slots import fields_of, slot_head
from kvhook.ring.trace_file import TraceWriter
from kvhook.schema import KINDS, REQUEST, STEP, VALUES, blank

BLOCKS, BLOCK_SIZE = 10_000, 16
#: Steps that are written at a time.
PIECE = 20_000


def make_trace(path: Path, steps: int, seed: int = 1) -> None:
    """A run of plausible numbers: 2 ms steps, up to 64 requests, one that finishes every 8 steps, single latencies of
    their own in every 16th step."""
    rng = np.random.default_rng(seed)
    layout = make_layout({})
    meta = {
        "engine": 0,
        "kvhook": "0.2.0",
        "vllm": "0.32.0",
        "python": "3.11.7",
        "adapter": "v1",
        "pid": os.getpid(),
        "model": "made-up",
        "num_kv_blocks": BLOCKS,
        "block_size": BLOCK_SIZE,
        "enable_prefix_caching": True,
        "hook_call_ns": 500,
        "num_kv_cache_groups": 1,
        "absent": {"step": {}, "request": {}},
    }
    writer = TraceWriter(path, layout, meta)
    writer.append_meta(0, meta)
    clock, n, requests = 10**12, 0, 0
    for first in range(0, steps, PIECE):
        count = min(PIECE, steps - first)
        piece, clock, requests = _piece(layout, rng, first, count, clock, requests)
        n = append(writer, piece, n)
    writer.append_meta(0, {"records_published": n})
    writer.close()


def append(writer: TraceWriter, piece: np.ndarray, n: int) -> int:
    """Write records, numbered from n on as a ring numbers them; gives the number of the next one."""
    slot_head(piece)["n"] = np.arange(n, n + len(piece))
    slot_head(piece)["stamp"] = 2 * slot_head(piece)["n"].astype(np.uint64) + 2
    writer.append(piece)
    return n + len(piece)


class Steps(NamedTuple):
    """What some steps of the run do, an array for each number. Every eighth step begins with a new request."""

    number: np.ndarray
    took: np.ndarray
    ends: np.ndarray
    running: np.ndarray
    used: np.ndarray
    begins: np.ndarray
    hits: np.ndarray
    prompt: np.ndarray

    @property
    def finishes(self) -> np.ndarray:
        """In which steps a request finishes."""
        return self.number % 8 == 7

    @property
    def listed(self) -> np.ndarray:
        """In which steps the latencies differ, so that each is kept."""
        return self.number % 16 == 5


def _piece(layout: Layout, rng: np.random.Generator, first: int, count: int, clock: int, requests: int):
    """The records of some steps; also the clock and the number of requests after them."""
    steps = _made_up(rng, np.arange(first, first + count), clock)
    ended, listed = steps.number[steps.finishes], steps.number[steps.listed]
    parts = [
        _slots(layout, "step", STEP, count, _scheduler_columns(rng, steps) | _iteration_columns(rng, steps)),
        _request_slots(layout, rng, ended, requests),
        _latency_slots(layout, rng, listed, steps.running[steps.listed]),
    ]
    # in the order in which kvhook writes them: what belongs to a step comes before it
    order = np.argsort(np.concatenate([2 * steps.number + 1, 2 * ended, 2 * listed]), kind="stable")
    return np.concatenate(parts)[order], int(steps.ends[-1]), requests + len(ended)


def _made_up(rng: np.random.Generator, number: np.ndarray, clock: int) -> Steps:
    """What the steps of these numbers do, the first of them beginning at `clock`."""
    count = len(number)
    took = (2e6 + 3e5 * rng.exponential(size=count)).astype(np.int64)
    ends = clock + np.cumsum(took + 20_000)
    running = np.clip(40 + 24 * np.sin(number / 3000) + rng.integers(-3, 4, count), 0, 64).astype(np.int64)
    used = np.clip(running * 120 + rng.integers(0, 400, count), 0, BLOCKS)
    begins = number % 8 == 0
    hits = np.where(begins, BLOCK_SIZE * rng.integers(0, 8, count), 0)
    prompt = np.where(begins, hits + rng.integers(17, 400, count), 0)
    return Steps(number, took, ends, running, used, begins, hits, prompt)


def _scheduler_columns(rng: np.random.Generator, steps: Steps) -> dict:
    """The columns of a step that come from the scheduler, and when the step was."""
    return {
        "step": steps.number,
        "t_start_ns": steps.ends - steps.took,
        "t_end_ns": steps.ends,
        "has_scheduler_stats": 1,
        "scheduler_stats_logged": 1,
        "num_running_reqs": steps.running,
        "num_waiting_reqs": rng.integers(0, 3, len(steps.number)),
        "num_skipped_waiting_reqs": 0,
        "num_kv_blocks": BLOCKS,
        "num_kv_blocks_used": steps.used,
        "num_kv_blocks_peak": steps.used,
        "kv_cache_usage": steps.used / BLOCKS,
        "kv_cache_usage_peak": steps.used / BLOCKS,
        "num_added_reqs": steps.begins,
        "prefix_cache_requests": steps.begins,
        "prefix_cache_queries": steps.prompt,
        "prefix_cache_hits": steps.hits,
    }


def _iteration_columns(rng: np.random.Generator, steps: Steps) -> dict:
    """The columns of a step that come from its outputs, and what kvhook took."""
    itl = steps.took / 1e9
    return {
        "has_iteration_stats": 1,
        "num_prompt_tokens": steps.prompt,
        "num_prompt_tokens_computed": steps.prompt - steps.hits,
        "num_prompt_tokens_cached": steps.hits,
        "num_generation_tokens": steps.running,
        "num_finished_reqs": steps.finishes,
        "ttft_count": steps.begins,
        **{f"ttft_{what}": np.where(steps.begins, 10 * itl, 0.0) for what in ("sum", "min", "max")},
        "itl_count": steps.running,
        "itl_sum": itl * steps.running,
        "itl_min": itl,
        "itl_max": np.where(steps.listed, itl + 1e-4, itl),
        "kvhook_ns": np.where(steps.begins, rng.integers(2000, 30000, len(steps.number)), -1),
    }


def _request_slots(layout: Layout, rng: np.random.Generator, ended: np.ndarray, requests: int):
    """Records of the requests that finished, one in each of these steps; `requests` is the first one's number."""
    request = requests + np.arange(len(ended))
    times = rng.exponential(0.5, (5, len(ended)))
    names = ("queued_time", "prefill_time", "decode_time", "inference_time", "e2e_latency")
    columns = {
        "request": request,
        "request_id": request,
        "step": ended,
        "finish_reason": 1,
        "num_prompt_tokens": 200,
        "num_generation_tokens": 300,
        "num_cached_tokens": 64,
        "max_tokens": 300,
        **dict(zip(names, times, strict=True)),
        "time_to_first_token": 0.02,
        "mean_time_per_output_token": times[2] / 299,
    }
    return _slots(layout, "request", REQUEST, len(ended), columns)


def _latency_slots(layout: Layout, rng: np.random.Generator, listed: np.ndarray, running: np.ndarray):
    """Records of single latencies between tokens, of these steps with so many requests."""
    lists = _slots(layout, "values", VALUES, len(listed), {"step": listed, "series": 1, "count": running})
    at = FIELDS_AT + 8 * len(layout.columns["values"])
    room = layout.values_per_slot
    lists[:, at : at + 8 * room].view("<f8")[:] = rng.normal(2e-3, 1e-4, (len(lists), room))
    fields_of(lists, layout.columns["values"])["count"] = np.minimum(running, room)
    return lists


def _slots(layout: Layout, kind: str, code: int, count: int, columns: dict):
    slots = np.zeros((count, layout.slot_bytes), np.uint8)
    slot_head(slots)["kind"] = code
    fields = fields_of(slots, layout.columns[kind])
    blanks = {f.name: float(blank(f)) for f in KINDS[kind][1]}
    for column in layout.columns[kind]:
        fields[column.name] = columns.get(column.name, blanks[column.name])
    return slots


#: What is measured: name -> statements. `path` is the trace, `out` a folder.
WORK = {
    "open": "kvhook.open(path).meta",
    "summary": "kvhook.open(path).summary()",
    "steps": "kvhook.open(path).steps()",
    "two columns": "kvhook.open(path).steps(columns=['step', 'kv_cache_usage'])",
    "csv": "kvhook.open(path).dump(out / 'run.csv')",
    "jsonl": "kvhook.open(path).dump(out / 'run.jsonl')",
    "compress": "kvhook.open(path).dump(out / 'small.kvh', compress=True)",
}

CHILD = """
import json, resource, sys, time
from pathlib import Path
import numpy
import kvhook, kvhook.trace
path, out = Path(sys.argv[1]), Path(sys.argv[2])
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 1e3
before, began, cpu = peak(), time.perf_counter(), time.process_time()
result = {work}
print(json.dumps({{"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu,
                  "peak_mb": peak(), "before_mb": before}}))
"""

#: A running session: its file has been added up but for the last records, as many as the spool's thread leaves.
LIVE = """
import json, os, sys, time
from pathlib import Path
import kvhook
from kvhook.recording.running import Running, summary_so_far
from kvhook.recording.spool import KEEP_UP
path = Path(sys.argv[1])
header = kvhook.open(path).header
tail = KEEP_UP * header.layout.slot_bytes
size = os.path.getsize(path)
with open(path, "r+b") as file:
    file.seek(size - tail)
    last = file.read()
    file.truncate(size - tail)
running = Running(lambda: ([path], [os.open(path, os.O_RDONLY)], {}))
running.keep_up()
def peak(what):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(what)) / 1e3
def ask():
    began, cpu = time.perf_counter(), time.process_time()
    running.ask(lambda so_far: summary_so_far(so_far, None), "run", {})
    return time.perf_counter() - began, time.process_time() - cpu
ask()
answers = [ask() for _ in range(20)]
with open(path, "ab") as file:
    file.write(last)
late = ask()
print(json.dumps({"answers": answers, "late": late, "anonymous_mb": peak("RssAnon:")}))
"""


def live(path: Path, steps: int, size: float) -> None:
    """Time of an answer of a running session, without anything new and with as much as there can be."""
    done = subprocess.run([sys.executable, "-c", LIVE, path], capture_output=True, text=True, check=True)
    r = json.loads(done.stdout)
    wall, cpu = (sorted(values)[len(values) // 2] for values in zip(*r["answers"], strict=True))
    late, late_cpu = r["late"]
    for what, seconds, its_cpu in (("session.summary()", wall, cpu), ("the same, with new records", late, late_cpu)):
        print(
            f"| {steps:,} | {size:,.0f} | {what} | {seconds:.3f} | {its_cpu:.3f} | {r['anonymous_mb']:.0f} |",
            flush=True,
        )


def measure(work: str, path: Path, out: Path) -> dict[str, float]:
    """The best of three processes."""
    runs = []
    for _ in range(3):
        code = textwrap.dedent(CHILD.format(work=work))
        done = subprocess.run([sys.executable, "-c", code, path, out], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        runs.append(json.loads(done.stdout))
        for file in out.iterdir():
            file.unlink()
    return min(runs, key=lambda run: run["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", type=float, default=[1e5, 1e6])
    parser.add_argument("--only", nargs="+", choices=[*WORK, "live"], default=[*WORK, "live"])
    args = parser.parse_args()
    print("| steps | file MB | what | seconds | CPU seconds | peak MB |\n| ---: | ---: | --- | ---: | ---: | ---: |")
    for steps in map(int, args.steps):
        with tempfile.TemporaryDirectory() as folder:
            path, out = Path(folder) / "run.kvh", Path(folder) / "out"
            out.mkdir()
            make_trace(path, steps)
            size = path.stat().st_size / 1e6
            for name, work in WORK.items():
                if name in args.only:
                    r = measure(work, path, out)
                    cells = f"{r['seconds']:.2f} | {r['cpu']:.2f} | {r['peak_mb']:.0f}"
                    print(f"| {steps:,} | {size:,.0f} | {name} | {cells} |", flush=True)
            if "live" in args.only:
                live(path, steps, size)


if __name__ == "__main__":
    main()
