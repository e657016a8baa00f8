"""What a reader that is attached at full speed costs the writer of a ring.

    python benchmarks/ring_reader_cost.py            the table
    python benchmarks/ring_reader_cost.py --json     one JSON document

A writer publishes at full speed; another process is attached and polls the ring as fast as it can, or is attached and
asleep. Blocks with and without alternate, in random order within each pair, so that whatever else the machine does
hits both alike; a pair's ratio is one sample. Two writers: one that only publishes records packed beforehand, which no
engine does and where a reader weighs most, and one that packs a record of its own each time, as a step does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measured_on import machine

from kvhook.ring.layout import make_layout
from kvhook.ring.reader import RingReader
from kvhook.ring.writer import RingWriter
from kvhook.schema import STEP

PAIRS = 300
BLOCK = 20_000
SLOTS = 8192
STOP, SLEEP, READ = 2, 0, 1


def main() -> int:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        for name, make in (("publish only", publish_only), ("pack and publish", pack_and_publish)):
            results[name] = measure(Path(folder) / f"{name}.ring", make, args.pairs)
    if args.json:
        print(json.dumps({"machine": machine(), "results": results}, indent=2))
        return 0
    print(f"{machine()}\n{args.pairs} pairs of blocks of {BLOCK:,} records, ring of {SLOTS:,} slots\n")
    print(f"{'writer':<18}{'alone':>10}{'with reader':>13}{'ratio':>9}{'95 % of the median':>22}{'wall':>9}{'read':>7}")
    for name, r in results.items():
        low, high = r["ratio_interval"]
        print(
            f"{name:<18}{r['alone_ns']:>7.0f} ns{r['read_ns']:>10.0f} ns{100 * (r['ratio'] - 1):>+8.1f}%"
            f"{100 * (low - 1):>+12.1f}% to {100 * (high - 1):+.1f}%"
            f"{100 * (r['wall_ratio'] - 1):>+8.1f}%{100 * r['share_read']:>6.0f}%"
        )
    return 0


def publish_only(pack: Any, publish: Any, n: int, values: list[float]) -> Callable[[], int]:
    """Publishes records that were packed before the clock starts."""
    records = [pack(i, STEP, 0, *values) for i in range(n, n + BLOCK)]

    def write() -> int:
        m = n
        for record in records:
            m = publish(m, record)
        return m

    return write


def pack_and_publish(pack: Any, publish: Any, n: int, values: list[float]) -> Callable[[], int]:
    """Packs each record, as a step does."""

    def write() -> int:
        m = n
        for _ in range(BLOCK):
            m = publish(m, pack(m, STEP, 0, *values))
        return m

    return write


def _zeros(layout: Any) -> list[float]:
    return [0.0 if c.type == "<f8" else 0 for c in layout.columns["step"]]


def measure(path: Path, make: Callable[[Any, Any, int, list[float]], Callable[[], int]], pairs: int) -> dict[str, Any]:
    """Paired blocks with and without a reader; the median ratio with a bootstrapped interval."""
    ring = RingWriter(path, make_layout({}), SLOTS, {"kvhook": "benchmark", "engine": 0})
    command = mmap.mmap(-1, mmap.PAGESIZE)
    words = memoryview(command).cast("Q")
    child = os.fork()
    if not child:
        read_for_ever(path, words)
    chance = random.Random(0)
    pack, values, n = ring.layout.struct_of("step").pack, _zeros(ring.layout), 0
    blocks: dict[int, list[float]] = {SLEEP: [], READ: []}
    wall: dict[int, list[float]] = {SLEEP: [], READ: []}
    try:
        n = make(pack, ring.publish, n, values)()
        for _ in range(pairs):
            for state in chance.sample((SLEEP, READ), 2):
                words[0] = state
                while words[1] != state:
                    time.sleep(0.0005)
                write = make(pack, ring.publish, n, values)
                start, cpu = time.perf_counter_ns(), time.thread_time_ns()
                n = write()
                wall[state].append((time.perf_counter_ns() - start) / BLOCK)
                blocks[state].append((time.thread_time_ns() - cpu) / BLOCK)
        words[0] = STOP
        os.waitpid(child, 0)
        child = 0
    finally:
        if child:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
    ratios = [r / s for r, s in zip(blocks[READ], blocks[SLEEP], strict=True)]
    medians = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(1000))
    return {
        "alone_ns": statistics.median(blocks[SLEEP]),
        "read_ns": statistics.median(blocks[READ]),
        "ratio": statistics.median(ratios),
        "ratio_interval": [medians[25], medians[975]],
        "wall_ratio": statistics.median(r / s for r, s in zip(wall[READ], wall[SLEEP], strict=True)),
        "share_read": words[2] / (pairs * BLOCK),
    }


def read_for_ever(path: Path, words: memoryview) -> None:
    """The reader: word 0 is what it is told, word 1 what it does, word 2 how many records it has got."""
    try:
        with RingReader(path) as reader:
            while words[0] != STOP:
                if words[0] == SLEEP:
                    words[1] = SLEEP
                    time.sleep(0.0005)
                    continue
                if words[1] != READ:
                    reader.cursor = reader.head
                    words[1] = READ
                words[2] += len(reader.poll().slots)
        os._exit(0)
    finally:
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
