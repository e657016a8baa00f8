"""How many records a second the spool takes from rings to a trace file, and what it takes from the engine's thread.

    python benchmarks/spool.py                 the three measurements
    python benchmarks/spool.py --dir /dev/shm  the trace in memory instead of on disk
    python benchmarks/spool.py --json          one JSON document

1. A writer in a process of its own publishes at a given rate, and the spool of this process streams its ring.
2. The writer is this process's main thread, as an engine's is: spool and writer share one interpreter lock.
3. 500 steps a second, as a small model does them: the processor time of the spool's thread, and the same without the
   system call that writes, during which it lets go of the interpreter lock: what it can take from the engine's thread.

After 1 and 2 the trace is opened and every record is looked at: none may be lost, and each must hold what was written.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from measured_on import machine

from kvhook.recording import spool as module
from kvhook.recording.spool import Spool
from kvhook.ring.layout import make_layout
from kvhook.ring.writer import RingWriter
from kvhook.schema import STEP
from kvhook.trace import open_trace

RATE = 600_000
SECONDS = 10.0
SLOTS = 1 << 18
BURST = 256
STEPS_PER_SECOND = 500
LAYOUT = make_layout({})
NAMES = [c.name for c in LAYOUT.columns["step"]]
#: Records that are packed beforehand: the writer is to write, not to pack. Only their number is put in front.
PERIOD = 4096


def main() -> int:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=int, default=RATE, help="records a second that the writers aim at")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--dir", type=Path, default=None, help="where the trace goes (default: a temporary directory)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as rings,
        tempfile.TemporaryDirectory(dir=args.dir or "/var/tmp") as disk,
    ):
        results = {
            "own process": throughput(Path(rings), Path(disk), args.rate, args.seconds, from_own_process),
            "same process": throughput(Path(rings), Path(disk), args.rate, args.seconds, from_this_process),
            "at rest": at_rest(Path(rings), Path(disk), args.seconds),
        }
    if args.json:
        print(json.dumps({"machine": machine(), "results": results}, indent=2))
    else:
        show(results, args)
    failed = [r for r in results.values() if r["lost"] or r["wrong"]]
    return 1 if failed else 0


def show(results: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    """The table."""
    print(
        f"{machine()}\nslots of {LAYOUT.slot_bytes} bytes, ring of {SLOTS:,} slots, trace in {args.dir or '/var/tmp'}\n"
    )
    print(
        f"{'writer':<14}{'records':>12}{'per second':>13}{'MB/s':>7}{'in the trace':>14}"
        f"{'lost':>11}{'wrong':>7}{'spool CPU':>11}{'with lock':>11}"
    )
    for name, r in results.items():
        print(
            f"{name:<14}{r['records']:>12,}{r['rate']:>13,.0f}{r['rate'] * LAYOUT.slot_bytes / 1e6:>7.0f}"
            f"{r['in_trace']:>14,}{r['lost']:>11,}{r['wrong']:>7,}{100 * r['spool_share']:>10.3f}%"
            + (f"{100 * r['lock_share']:>10.3f}%" if "lock_share" in r else "")
        )


class Writer:
    """Publishes step records whose number stands in their first column and decides the others."""

    def __init__(self, path: Path, slots: int = SLOTS) -> None:
        self.ring = RingWriter(path, LAYOUT, slots, {"kvhook": "benchmark", "engine": 0})
        pack = LAYOUT.struct_of("step").pack
        zeros = [0.0 if c.type == "<f8" else 0 for c in LAYOUT.columns["step"]]
        marked = NAMES.index("num_generation_tokens")
        self.rest = []
        for i in range(PERIOD):
            values = zeros.copy()
            values[marked] = i
            self.rest.append(pack(0, STEP, 0, *values)[8:])
        self.n = 0

    def write(self, count: int) -> None:
        """So many records, as fast as it goes."""
        publish, rest, mask = self.ring.publish, self.rest, PERIOD - 1
        for n in range(self.n, self.n + count):
            publish(n, n.to_bytes(8, "little") + rest[n & mask])
        self.n += count

    def write_paced(self, rate: float, seconds: float, burst: int = BURST) -> float:
        """Records at a rate, in bursts; gives the seconds that it took."""
        start = time.perf_counter()
        while (now := time.perf_counter() - start) < seconds:
            if self.n < now * rate:
                self.write(burst)
            else:
                time.sleep(min(0.0002, burst / rate))
        return time.perf_counter() - start


Run = Callable[[Path, Path, int, float], tuple[int, float, float]]


def from_own_process(ring: Path, trace: Path, rate: int, seconds: float) -> tuple[int, float, float]:
    """Records, seconds, and processor seconds of the spool's thread, with the writer in a process of its own."""
    shared = mmap.mmap(-1, mmap.PAGESIZE)
    words = memoryview(shared).cast("d")
    child = os.fork()
    if not child:
        try:
            writer = Writer(ring)
            words[0] = 1
            while not words[1]:
                time.sleep(0.001)
            words[3] = writer.write_paced(rate, seconds)
            words[2] = writer.n
        finally:
            os._exit(0)
    while not words[0]:
        time.sleep(0.001)
    stand_in: Any = SimpleNamespace(path=ring, layout=LAYOUT, capacity=SLOTS)
    spool, cpu = start_spool(stand_in, trace)
    words[1] = 1
    os.waitpid(child, 0)
    used = cpu()
    spool.close()
    return int(words[2]), words[3], used


def from_this_process(ring: Path, trace: Path, rate: int, seconds: float) -> tuple[int, float, float]:
    """The same with the writer in this thread."""
    writer = Writer(ring)
    spool, cpu = start_spool(writer.ring, trace)
    took = writer.write_paced(rate, seconds)
    used = cpu()
    spool.close()
    return writer.n, took, used


def start_spool(ring: Any, trace: Path) -> tuple[Spool, Callable[[], float]]:
    """A spool that drains a ring, and what tells the processor seconds of its thread since now."""

    def fault(where: str, error: BaseException, then: str) -> None:
        print(f"{where}: {error}; {then}", file=sys.stderr)

    spool = Spool(lambda number: trace, None, fault)
    recorder: Any = SimpleNamespace(number=0, ring=ring, meta={"kvhook": "benchmark", "engine": 0})
    spool.add(recorder)
    thread = spool._thread
    assert thread is not None
    clock = time.pthread_getcpuclockid(thread.ident or 0)
    before = time.clock_gettime(clock)
    return spool, lambda: time.clock_gettime(clock) - before


def throughput(rings: Path, disk: Path, rate: int, seconds: float, run: Run) -> dict[str, Any]:
    """One run, and a look at every record of its trace."""
    ring, trace = rings / f"{run.__name__}.ring", disk / f"{run.__name__}.kvh"
    records, took, used = run(ring, trace, rate, seconds)
    in_trace, wrong = check(trace)
    ring.unlink()
    trace.unlink()
    return {
        "records": records,
        "rate": records / took,
        "in_trace": in_trace,
        "lost": records - in_trace,
        "wrong": wrong,
        "spool_share": used / took,
    }


def check(path: Path) -> tuple[int, int]:
    """How many records a trace holds, and how many of them are out of order or hold something else."""
    from kvhook.ring.slots import fields_of, slot_head

    count, wrong, last = 0, 0, -1
    trace = open_trace(path)
    for slots, layout in trace.chunks():
        head = slot_head(slots)
        slots = slots[head["kind"] == STEP]
        n = slot_head(slots)["n"]
        tokens = fields_of(slots, layout.columns["step"])["num_generation_tokens"]
        wrong += int((np.diff(n, prepend=last) <= 0).sum() + (tokens != n % PERIOD).sum())
        count += len(n)
        last = int(n[-1]) if len(n) else last
    return count, wrong + trace.damaged


def at_rest(rings: Path, disk: Path, seconds: float) -> dict[str, Any]:
    """What the spool's thread takes at the rate of a small model, with the ring of the default size."""
    writer = Writer(rings / "rest.ring", 8192)
    trace = disk / "rest.kvh"
    spool, cpu = start_spool(writer.ring, trace)
    without_lock = [0]
    module.os = SimpleNamespace(**vars(os) | {"pwrite": timed(os.pwrite, without_lock)})
    start = time.perf_counter()
    for n in range(int(seconds * STEPS_PER_SECOND)):
        writer.write(1)
        time.sleep(max(0.0, start + n / STEPS_PER_SECOND - time.perf_counter()))
    took, used = time.perf_counter() - start, cpu()
    module.os = os
    spool.close()
    in_trace, wrong = check(trace)
    return {
        "records": writer.n,
        "rate": writer.n / took,
        "in_trace": in_trace,
        "lost": writer.n - in_trace,
        "wrong": wrong,
        "spool_share": used / took,
        "lock_share": (used - without_lock[0] / 1e9) / took,
    }


def timed(call: Callable[..., int], total: list[int]) -> Callable[..., int]:
    """The same call, with its processor time added up."""

    def run(*args: Any) -> int:
        start = time.thread_time_ns()
        try:
            return call(*args)
        finally:
            total[0] += time.thread_time_ns() - start

    return run


if __name__ == "__main__":
    sys.exit(main())
