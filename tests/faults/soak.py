"""A long run of an engine that plays its steps, 2,000 a second: spool, `kvhook top --once`, `kvhook tail` and readers
that are killed at random. Nothing may be lost, and nothing may grow.

    python -m tests.faults.soak            # 8 seconds
    KVHOOK_SOAK_SECONDS=1800 make soak     # the long form
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from typing import NamedTuple

import kvhook
from kvhook.recording.segments import SEGMENTS
from tests.faults.long_run import descriptors, is_trace, memory_kb, run, threads
from tests.standin import fake_vllm, step_stats

RATE = 2000
#: After a pause that the machine made, up to twice as many steps a second make up for it, and at most so many come at
#: once: a quarter of a ring. What is missed beyond so many seconds is left out, and counted as late.
BURST, MAKES_UP = 1000, 2.0
#: Bytes of history that are kept: the long form goes over it many times, and the oldest part is dropped.
HISTORY = 64 << 20
READERS = (["top", "--once"], ["ls"], ["tail"])


class Soaked(NamedTuple):
    """What came of it."""

    seconds: float
    steps: int
    #: steps that are there, the number of the last one, and records of all kinds
    recorded: int
    last: int
    published: int
    there: int
    #: records that fell out of the bounded history, and those that are lost
    dropped: int
    lost: int
    faults: int
    readers: int
    killed: int
    grown_kb: int
    descriptors: int
    threads: int
    files: int
    disk_bytes: int
    #: steps for which the machine gave no time; the longest time between two turns, and the longest step
    late: int
    pause_ms: int
    step_ms: int

    def complaints(self) -> list[str]:
        """What is not as it must be."""
        wrong = []
        if self.lost or self.there + self.dropped != self.published:
            wrong.append(f"{self.lost} records are lost")
        if self.last != self.steps - 1 or (self.recorded != self.steps and not self.dropped):
            wrong.append(f"{self.recorded} of {self.steps} steps are there, the last is number {self.last}")
        if self.faults:
            wrong.append(f"{self.faults} faults in kvhook")
        if self.grown_kb > 48 << 10:
            wrong.append(f"the process has grown by {self.grown_kb} KB")
        if self.descriptors > 2 or self.threads > 0:
            wrong.append(
                f"{self.descriptors} descriptors and {self.threads} threads more than after an eighth of the time"
            )
        if self.files > SEGMENTS + 1:
            wrong.append(f"{self.files} files")
        if self.disk_bytes > HISTORY + (16 << 20):
            wrong.append(f"{self.disk_bytes} bytes on disk")
        return wrong


class Pace:
    """How many steps are due."""

    def __init__(self) -> None:
        self.start = self.last = time.monotonic()
        self.steps = self.late = 0
        self.longest = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self.last - self.start

    def turn(self) -> int:
        """Steps to be made in this turn."""
        now = time.monotonic()
        pause, self.last = now - self.last, now
        self.longest = max(self.longest, pause)
        missing = int(self.elapsed * RATE) - self.late - self.steps
        left_out = max(0, missing - int(MAKES_UP * RATE))
        self.late += left_out
        due = min(missing - left_out, BURST, max(int(pause * 2 * RATE), 4))
        self.steps += due
        return due


class Readers:
    """Other processes that look at the ring, of which some are killed while they do."""

    def __init__(self, seed: int) -> None:
        self.random, self.running, self.begun, self.killed = random.Random(seed), list[subprocess.Popen[bytes]](), 0, 0

    def look_after(self) -> None:
        """Begin one if there is none; kill it perhaps."""
        self.running = [each for each in self.running if each.poll() is None]
        if not self.running:
            verb = self.random.choice(READERS)
            quiet = subprocess.DEVNULL
            self.running.append(
                subprocess.Popen([sys.executable, "-m", "kvhook", *verb], stdin=quiet, stdout=quiet, stderr=quiet)
            )
            self.begun += 1
        elif self.random.random() < 0.2:
            self.running[0].kill()
            self.running[0].wait()
            self.killed += 1

    def end(self) -> None:
        for each in self.running:
            each.kill()
            each.wait()


def soak(seconds: float, seed: int = 1) -> Soaked:
    """Let it run."""
    readers = Readers(seed)
    with fake_vllm() as vllm, kvhook.install(history=HISTORY, core="off") as session:
        engine = vllm.engine()
        stats = step_stats(num_running_reqs=8, kv_cache_usage=0.5, generated=8, itl=[0.01, 0.02, 0.03])
        pace, tick, before, longest = Pace(), 0.0, (0, 0, 0), 0.0
        while pace.elapsed < seconds:
            engine.plan += [stats] * pace.turn()
            while engine.plan:
                begun = time.monotonic()
                engine.step()
                longest = max(longest, time.monotonic() - begun)
            if pace.elapsed - tick > 0.5:
                readers.look_after()
                session.summary()
                tick = pace.elapsed
                if tick > seconds / 8 and not before[0]:
                    before = memory_kb(), descriptors(), threads()
            time.sleep(0.001)
        readers.end()
        grown, opened = memory_kb() - before[0], descriptors() - before[1]
        health, trace = session.health(), session.trace()
        meta, numbers = trace.meta, trace.steps(columns=["step"])["step"]
        files = {os.fstat(fd).st_ino: os.fstat(fd) for fd in map(int, os.listdir("/proc/self/fd")) if is_trace(fd)}
        return Soaked(
            pace.elapsed,
            pace.steps,
            len(numbers),
            int(numbers[-1]),
            health.records,
            meta["records"],
            meta["records_dropped"],
            meta["records_lost"],
            len(health.seams),
            readers.begun,
            readers.killed,
            grown,
            opened,
            threads() - before[2],
            len(files),
            sum(each.st_size for each in files.values()),
            pace.late,
            int(pace.longest * 1000),
            int(longest * 1000),
        )


def main() -> int:
    """Prints what came of it; 1 if something is wrong."""
    return run(lambda seconds, _: soak(seconds), short=8)


if __name__ == "__main__":
    sys.exit(main())
