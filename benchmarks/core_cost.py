"""What recording inside the engine core costs, without a model: vLLM's own scheduler and block pool, decoding.

    python benchmarks/core_cost.py            batches of 1, 8 and 64
    python benchmarks/core_cost.py 1 256      of these
    python benchmarks/core_cost.py --json

A step is one ``schedule`` and one ``update_from_output``, in processor time of the thread. Blocks of steps without
recording, with the extension's counting and with Python's take turns on one scheduler, so that all see the same
machine. A figure is what the fastest tenth of all such steps stays below, less the same of the steps without, so that
what else the machine does hardly moves it; steps that allocate blocks, one in 16, are not among them. "cold": before
each of the two calls the caches that the processor's core has for itself are filled with something else, as a forward
pass does it (`engine_ab.py` measures that as a whole).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

PAIRS = 12
#: state -> steps in a block
STATES = {"warm": 16, "cold": 8}
LEVELS = ("steps", "blocks")


def measure(batch: int) -> list[dict[str, Any]]:
    """Microseconds of a step without recording, and what recording adds to it, for each state and level."""
    from cost_timing import cache_bytes, walk  # type: ignore[import-not-found, unused-ignore]

    from kvhook import _step
    from kvhook.demo.model import make_tiny_model, tiny_model_dir
    from tests.core.scheduler_here import Driver

    paths = {"python": None} | ({"c": _step.native} if _step.native is not None else {})
    between = {"warm": lambda: None, "cold": walk(4 * cache_bytes()[0])}
    steps = 10 + PAIRS * sum(STATES.values()) * len(LEVELS) * (1 + len(paths))
    driver = Driver(
        str(make_tiny_model(tiny_model_dir())),
        blocks=batch * (steps // 16 + 4) + 10,
        block_size=16,
        max_num_seqs=batch,
        max_num_batched_tokens=max(2048, batch * 8),
        max_model_len=2048,
    )
    for number in range(batch):
        driver.add([2 + (number + i) % 400 for i in range(20)], max_tokens=steps + 100)
    for _ in range(10):
        driver.step()
    found: dict[tuple[str, str, str], list[float]] = {}
    for _ in range(PAIRS):
        for state, level in product(STATES, LEVELS):
            found.setdefault((state, level, "step"), []).extend(_block(driver, STATES[state], between[state]))
            for path in random.sample(list(paths), len(paths)):
                with _recorded(driver, level, paths[path]):
                    found.setdefault((state, level, path), []).extend(_block(driver, STATES[state], between[state]))
    fast = {key: statistics.quantiles(times, n=10)[0] for key, times in found.items()}
    rows = []
    for state, level in product(STATES, LEVELS):
        without = fast[state, level, "step"]
        more = {path: round(fast[state, level, path] - without, 1) for path in paths}
        rows.append({"batch": batch, "state": state, "level": level, "step": round(without, 1), **more})
    return rows


@contextlib.contextmanager
def _recorded(driver: Any, level: str, native: Any) -> Iterator[None]:
    """The driver's core is recorded, by the extension or in Python."""
    from kvhook import _step
    from kvhook.adapters.core import read_core
    from kvhook.core.ledger import LedgerRing
    from kvhook.core.recorder import CoreRecorder

    with tempfile.TemporaryDirectory() as folder:
        there, _step.native = _step.native, native
        try:
            core = read_core(driver.scheduler)
            recorder = CoreRecorder(0, core, Path(folder), 1024, {})
            ledger = LedgerRing(0, Path(folder), 1024, {"serial": 0}) if level == "blocks" else None
            recorder.follow(core, _raise, ledger)
        finally:
            _step.native = there
        for _ in range(2):  # the first time is dearer
            driver.step()
        yield
        recorder.stop()
        recorder.close()
        if ledger is not None:
            ledger.close()


def _block(driver: Any, steps: int, between: Callable[[], object]) -> list[float]:
    """Microseconds of processor time of each step of a block; sampling tokens is not counted."""
    times = []
    for _ in range(steps):
        between()
        start = time.thread_time_ns()
        output = driver.scheduler.schedule()
        spent = time.thread_time_ns() - start
        result = driver.result_of(output)
        between()
        start = time.thread_time_ns()
        driver.scheduler.update_from_output(output, result)
        times.append((spent + time.thread_time_ns() - start) / 1000)
    return times


def _raise(error: BaseException) -> None:
    raise error


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("batches", nargs="*", type=int, default=[1, 8, 64], help="requests that decode")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    rows = [row for batch in arguments.batches for row in measure(batch)]
    if arguments.json:
        print(json.dumps(rows))
        return
    print("state level   batch  schedule + update   kvhook adds: Python         C")
    for row in rows:
        print(f"{row['state']:6}{row['level']:7}{row['batch']:6}{row['step']:16} us", end="")
        print(f"{row['python']:20} us {row.get('c', '-'):>7} us")


if __name__ == "__main__":
    main()
