"""A long run of a real engine: random prompts, aborts, preemptions and emptied prefix caches, with a spool, and readers
that are killed at random. Nothing may be lost, nothing may grow, and the books must balance at the end.

    python -m tests.faults.soak_engine                    # 20 seconds
    KVHOOK_SOAK_SECONDS=600 make soak ARGS=--engine       # the long form

A process that runs a model grows by itself. So the same work is done again without kvhook, in another process: what the
one has grown by and the other has not is kvhook's.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import kvhook
from tests.engine.conftest import ENVIRONMENT
from tests.faults.long_run import descriptors, run, settled_kb, threads
from tests.faults.soak import Readers
from tests.workloads import BLOCK_SIZE, tokens

#: Requests that are under way at the same time: more than there are blocks for.
MOST = 30
#: What may happen between two steps, and how often.
ADD, ABORT, RESET = 0.12, 0.01, 0.004
#: What the process may grow by after the first eighth of the time, beyond what it grows by without kvhook.
GROWTH_KB = 24 << 10


class Counted(NamedTuple):
    """What the driver itself has counted; `num_preempted_reqs` is counted at the scheduler."""

    steps: int = 0
    num_added_reqs: int = 0
    num_aborted_reqs: int = 0
    num_finished_reqs: int = 0
    num_generation_tokens: int = 0
    num_preempted_reqs: int = 0
    resets: int = 0


class Driver:
    """Drives an engine at random, and counts what it gives."""

    def __init__(self, engine: Any, seed: int) -> None:
        self.engine, self.random = engine, random.Random(seed)
        self.shared = [tokens(self.random, count * BLOCK_SIZE) for count in (1, 2, 4)]
        self.counted = Counted()
        #: request -> tokens that it has given so far
        self.live: dict[str, int] = {}
        #: vLLM tells of a preemption with the next output of the request: request -> preemptions that it has not told
        self.untold = Counter[str]()
        #: preemptions of requests that were aborted before that
        self.never_told = self.turns = 0
        self.scheduler = engine.engine_core.engine_core.scheduler
        preempt = self.scheduler._preempt_request

        def preempted(request: Any, *args: Any, **kwargs: Any) -> Any:
            self.count(num_preempted_reqs=1)
            # newer releases put something random behind the name
            self.untold[request.request_id.partition("-")[0]] += 1
            return preempt(request, *args, **kwargs)

        self.scheduler._preempt_request = preempted

    def count(self, **more: int) -> None:
        """Count something up."""
        self.counted = self.counted._replace(**{name: getattr(self.counted, name) + n for name, n in more.items()})

    def turn(self) -> None:
        """Perhaps something happens; then a step."""
        r = self.random
        self.turns += 1
        while len(self.live) < MOST and (not self.live or r.random() < ADD):
            self.add()
        if r.random() < ABORT:
            self.abort(r.choice(list(self.live)))
        if r.random() < RESET:
            # with requests at work vLLM refuses, or preempts them all
            self.count(resets=bool(self.engine.reset_prefix_cache(reset_running_requests=r.random() < 0.3)))
        if self.live:
            self.step()

    def add(self) -> None:
        """A request, with a beginning that others have too."""
        from vllm import SamplingParams  # type: ignore[import-not-found, unused-ignore]

        r = self.random
        prompt = r.choice([*self.shared, []]) + tokens(r, r.choice([1, 20, 90, 250]))
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=r.choice([1, 8, 60, 120]))
        name = str(self.counted.num_added_reqs)
        self.engine.add_request(name, {"prompt_token_ids": prompt}, params)
        self.live[name] = 0
        self.count(num_added_reqs=1)

    def abort(self, name: str) -> None:
        """The user does not want it any more."""
        self.engine.abort_request([name])
        del self.live[name]
        self.never_told += self.untold.pop(name, 0)
        self.count(num_aborted_reqs=1, num_finished_reqs=1)

    def step(self) -> None:
        """A step, and what came of it."""
        outputs = self.engine.step()
        self.count(steps=1)
        for output in outputs:
            self.untold.pop(output.request_id, 0)
            given = len(output.outputs[0].token_ids)
            self.count(num_generation_tokens=given - self.live[output.request_id])
            self.live[output.request_id] = given
            if output.finished:
                del self.live[output.request_id]
                self.count(num_finished_reqs=1)

    def end(self) -> None:
        """What is under way is brought to its end."""
        while self.live:
            self.step()


class Soaked(NamedTuple):
    """What came of it."""

    seconds: float
    counted: Counted
    recorded: Counted
    #: what vLLM told nobody of, because the request was aborted before its next output
    never_told: int
    core_steps: int
    core_preempted: int
    accounts: int
    unbalanced: list[str]
    records: int
    lost: int
    faults: list[str]
    readers: int
    killed: int
    grown_kb: int
    grown_without_kb: int
    descriptors: int
    threads: int
    trace_bytes: int

    def complaints(self) -> list[str]:
        """What is not as it must be."""
        wrong = [f"{name}: {made} are recorded" for name, made in self.differences().items()]
        wrong += [f"the books do not balance: {account}" for account in self.unbalanced] + self.faults
        if self.lost:
            wrong.append(f"{self.lost} records are lost")
        if self.core_steps < self.counted.steps - self.counted.resets:
            wrong.append(f"{self.core_steps} steps of the engine core")
        if self.core_preempted != self.counted.num_preempted_reqs:
            wrong.append(f"{self.core_preempted} of {self.counted.num_preempted_reqs} preemptions in the core")
        if self.grown_kb - self.grown_without_kb > GROWTH_KB:
            wrong.append(f"the process has grown by {self.grown_kb} KB, and by {self.grown_without_kb} without kvhook")
        if self.descriptors > 2 or self.threads > 0:
            wrong.append(f"{self.descriptors} descriptors and {self.threads} threads more than at first")
        if not (self.counted.num_preempted_reqs and self.counted.num_aborted_reqs and self.counted.resets):
            wrong.append("not everything that should happen has happened")
        return wrong

    def differences(self) -> dict[str, str]:
        """Where the driver and kvhook differ."""
        told = self.counted._replace(num_preempted_reqs=self.counted.num_preempted_reqs - self.never_told)
        pairs = zip(Counted._fields, told, self.recorded, strict=True)
        return {name: f"{recorded:,} of {counted:,}" for name, counted, recorded in pairs if counted != recorded}


def soak(engine: Any, session: Any, seconds: float, seed: int = 1) -> Soaked:
    """Let it run, on an engine with nothing to do that this session records."""
    readers, driver, begun = Readers(seed), Driver(engine, seed), time.monotonic()
    before, early, tick, elapsed = (0, 0, 0), 0, 0.0, 0.0
    while elapsed < seconds:
        driver.turn()
        elapsed = time.monotonic() - begun
        if elapsed - tick > 0.5:
            readers.look_after()
            session.summary()
            tick = elapsed
            if tick > seconds / 8 and not before[0]:
                before, early = (settled_kb(), descriptors(), threads()), driver.turns
    driver.end()
    readers.end()
    grown, opened, more = settled_kb() - before[0], descriptors() - before[1], threads() - before[2]
    health, summary, steps, core = session.health(), session.summary(), session.steps(), session.core_steps()
    totals = {name: int(steps[name].sum()) for name in Counted._fields if name in (steps.dtype.names or ())}
    resets = int(core["prefix_cache_reset"].sum())
    return Soaked(
        elapsed,
        driver.counted,
        Counted(**totals | {"steps": len(steps), "resets": resets}),
        driver.never_told,
        len(core),
        int(core["num_preempted_reqs"].sum()),
        len(summary.accounts),
        [f"{a.name}: {a.left} and {a.right}, {a.explained_by}" for a in summary.accounts if not a.ok],
        health.records,
        health.records_lost,
        [str(seam) for seam in health.seams],
        readers.begun,
        readers.killed,
        grown,
        grown_without(seed, early, driver.turns),
        opened,
        more,
        sum(path.stat().st_size for path in Path(os.environ["KVHOOK_DIR"]).parent.glob("*.kvh")),
    )


def grown_without(seed: int, early: int, turns: int) -> int:
    """What a process without kvhook grows by, in KB, between these two turns of the same work."""
    command = [sys.executable, "-m", __spec__.name, "bare", str(seed), str(early), str(turns)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[-1])


def bare(seed: int, early: int, turns: int, folder: Path) -> int:
    """The work without kvhook, in this process."""
    driver, before = Driver(make_engine(folder), seed), 0
    while driver.turns < turns:
        driver.turn()
        if driver.turns == early:
            before = settled_kb()
    driver.end()
    return settled_kb() - before


def make_engine(folder: Path) -> Any:
    """A real engine, in this process."""
    os.environ |= ENVIRONMENT
    from tests.engine import vllm_here

    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = vllm_here.no_binding()
    from vllm import LLM  # type: ignore[import-not-found, unused-ignore]

    from kvhook.demo.model import make_tiny_model

    return LLM(model=str(make_tiny_model(folder / "tiny")), **vllm_here.options()).llm_engine


def play(seconds: float, folder: Path) -> Soaked:
    """The run, recorded."""
    with kvhook.install(trace=folder / "run.kvh") as session:
        return soak(make_engine(folder), session, seconds)


def main() -> int:
    """Prints what came of it; 1 if something is wrong."""
    if sys.argv[1:2] == ["bare"]:
        seed, early, turns = map(int, sys.argv[2:])
        with tempfile.TemporaryDirectory() as folder:
            print(bare(seed, early, turns, Path(folder)))
        return 0
    return run(play, short=20)


if __name__ == "__main__":
    sys.exit(main())
