"""What recording inside the engine core costs, without a model: vLLM's own scheduler and block pool, decoding.

    python benchmarks/core_cost.py            batches of 1, 8, 64 and 256
    python benchmarks/core_cost.py --json

A step is one ``schedule`` and one ``update_from_output``, in processor time of the thread. Blocks of steps with and
without recording take turns on one scheduler, so that both see the same machine; the figure is the median over the
blocks of the difference. Caches are warm here: behind a forward pass everything, vLLM's own part too, takes a few times
as long (`engine_ab.py` measures that).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

STEPS, PAIRS = 50, 12


def measure(batch: int, level: str) -> dict[str, float]:
    """Microseconds of a step without recording, and what recording adds to it."""
    from kvhook.adapters.core import read_core
    from kvhook.core.ledger import LedgerRing
    from kvhook.core.recorder import CoreRecorder
    from kvhook.demo.model import make_tiny_model, tiny_model_dir
    from tests.core.scheduler_here import Driver

    driver = Driver(
        str(make_tiny_model(tiny_model_dir())),
        blocks=batch * 130 + 10,
        block_size=16,
        max_num_seqs=batch,
        max_num_batched_tokens=max(2048, batch * 8),
        max_model_len=2048,
    )
    for number in range(batch):
        driver.add([2 + (number + i) % 400 for i in range(20)], max_tokens=1900)
    for _ in range(10):
        driver.step()
    plain, more, own = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(PAIRS):
            without = _block(driver)
            core = read_core(driver.scheduler)
            recorder = CoreRecorder(number, core, Path(folder), 1024, {})
            ledger = LedgerRing(number, Path(folder), 1024, {"serial": number}) if level == "blocks" else None
            recorder.follow(core, _raise, ledger)
            own.append(_block(driver))
            recorder.stop()
            recorder.close()
            if ledger is not None:
                ledger.close()
            plain.append(without)
            more.append(own[-1] - without)
    return {
        "batch": batch,
        "step_us": round(statistics.median(plain), 1),
        "added_us": round(statistics.median(more), 1),
    }


def _block(driver: Any) -> float:
    """Microseconds of processor time of a step, on average over a block; sampling tokens is not counted."""
    spent = 0
    for _ in range(STEPS):
        start = time.thread_time_ns()
        output = driver.scheduler.schedule()
        spent += time.thread_time_ns() - start
        result = driver.result_of(output)
        start = time.thread_time_ns()
        driver.scheduler.update_from_output(output, result)
        spent += time.thread_time_ns() - start
    return spent / STEPS / 1000


def _raise(error: BaseException) -> None:
    raise error


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    results = {level: [measure(batch, level) for batch in (1, 8, 64, 256)] for level in ("steps", "blocks")}
    if arguments.json:
        print(json.dumps(results))
        return
    print("level    batch  schedule + update  kvhook adds")
    for level, rows in results.items():
        for row in rows:
            print(f"{level:8}{row['batch']:6}{row['step_us']:14} us {row['added_us']:10} us")


if __name__ == "__main__":
    main()
