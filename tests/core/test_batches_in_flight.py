"""Several batches under way at once: a count goes to the batch whose ``schedule`` or ``update_from_output`` it was in.

A pipeline puts further batches together before the first one's result is there; asynchronous scheduling does that with
the same requests. What a batch did is read from vLLM's own objects around each call.
"""

from __future__ import annotations

import functools
import random
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.core.books import kinds_of_tokens
from tests.core.conftest import Recording

Make = Callable[..., Recording]

#: Blocks run short, so that requests are preempted and cached blocks evicted.
SETTINGS: dict[str, Any] = {"blocks": 30, "max_num_seqs": 8, "max_num_batched_tokens": 96, "max_model_len": 512}


def asynchronous(config: Any) -> None:
    module = pytest.importorskip(
        "vllm.v1.core.sched.async_scheduler", reason="this vLLM has no asynchronous scheduling", exc_type=ImportError
    )
    config.scheduler_config.async_scheduling = True
    config.scheduler_config.scheduler_cls = module.AsyncScheduler


def pipeline(config: Any) -> None:
    """vLLM's usual scheduler is what a pipeline has."""


class Batches:
    """Drives a core with up to `depth` batches under way, and notes for each what the core held before and after.

    Attributes:
        rows: for each batch in the order in which they were put together, columns of the core's steps.
    """

    def __init__(self, driver: Any, depth: int, lookups: list[str]) -> None:
        self.driver, self.depth, self.lookups = driver, depth, lookups
        self.rows: list[dict[str, int]] = []
        self.flying: deque[tuple[dict[str, int], Any, Any]] = deque()
        #: how many were under way when one was put together
        self.others: list[int] = []
        #: request id -> the batch whose update ended it, or that had been put together last when it was aborted
        self.ended: dict[str, int] = {}
        #: request id -> how many of its tokens had been computed when it was preempted
        self.computed: dict[str, int] = {}
        self._ended, self._held = 0, 0

    def used(self) -> int:
        pool = self.driver.pool
        return sum(1 for block in pool.blocks if block is not pool.null_block and block.ref_cnt)

    def cached(self) -> set[Any]:
        """The blocks that can be found."""
        return {(b.block_id, b.block_hash) for b in self.driver.pool.blocks if b.block_hash is not None}

    def between(self, act: Callable[[], Any]) -> None:
        """Something from outside, which belongs to the batch that comes next."""
        before, requests = self.used(), set(self.driver.scheduler.requests)
        act()
        self._held += self.used() - before
        ended = requests - set(self.driver.scheduler.requests)
        self._ended += len(ended)
        self.ended |= dict.fromkeys(ended, len(self.rows) - 1)

    def schedule(self) -> None:
        scheduler = self.driver.scheduler
        running, used, cached = {r.request_id for r in scheduler.running}, self.used(), self.cached()
        self.others.append(len(self.flying))
        self.lookups.clear()
        before = {r.request_id: r.num_computed_tokens for r in scheduler.running}
        output = self.driver.schedule()
        for name in running - {r.request_id for r in scheduler.running}:
            self.computed[name] = max(self.computed.get(name, 0), before[name])
        row = {
            **kinds_of_tokens(scheduler, output.num_scheduled_tokens, self.computed),
            "step": len(self.rows),
            "num_scheduled_tokens": output.total_num_scheduled_tokens,
            "num_preempted_reqs": len(running - {r.request_id for r in scheduler.running}),
            "num_lookups": len(self.lookups),
            "num_kv_blocks_evicted": len(cached - self.cached()),
            "num_kv_blocks_peak": self.used(),
            "taken": self.used() - used + self._held,
            "num_finished_reqs": self._ended,
        }
        self._held = self._ended = 0
        self.rows.append(row)
        # what a model runner finds is known when the batch has been put together
        self.flying.append((row, output, self.driver.result_of(output)))

    def update(self) -> None:
        row, output, result = self.flying.popleft()
        used, requests = self.used(), set(self.driver.scheduler.requests)
        self.driver.scheduler.update_from_output(output, result)
        row["taken"] += self.used() - used
        ended = requests - set(self.driver.scheduler.requests)
        row["num_finished_reqs"] += len(ended)
        self.ended |= dict.fromkeys(ended, row["step"])

    def step(self) -> None:
        """As an engine core does it: another batch before the oldest one's result."""
        if self.driver.scheduler.has_requests():
            self.schedule()
        while len(self.flying) >= self.depth or (self.flying and not self.driver.scheduler.has_requests()):
            self.update()

    def run(self) -> None:
        for _ in range(100_000):
            if not self.flying and not self.driver.scheduler.has_unfinished_requests():
                return
            self.step()
        raise AssertionError("the scheduler does not come to an end")


@pytest.fixture
def lookups(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The requests that vLLM looks up in its prefix cache."""
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    ids, original = list[str](), KVCacheManager.get_computed_blocks

    def get_computed_blocks(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        ids.append(request.request_id)
        return original(self, request, *args, **kwargs)

    monkeypatch.setattr(KVCacheManager, "get_computed_blocks", get_computed_blocks)
    return ids


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("kind", "depth"), [(pipeline, 2), (pipeline, 4), (asynchronous, 2)])
def test_each_count_goes_to_the_batch_that_it_was_in(
    driver: Make, lookups: list[str], kind: Callable[[Any], None], depth: int, seed: int
):
    recording = driver(change=kind, seed=seed, **SETTINGS)
    batches, rng = Batches(recording.driver, depth, lookups), random.Random(seed)
    shared = [rng.randrange(2, 500) for _ in range(100)]
    for wave in range(4):
        names = []
        for _ in range(rng.randrange(4, 12)):
            prompt = [rng.randrange(2, 500) for _ in range(rng.randrange(1, 120))]
            request = recording.driver.add(shared * (rng.random() < 0.5) + prompt, max_tokens=rng.randrange(1, 40))
            names.append(request.request_id)
        for _ in range(rng.randrange(5, 40)):
            batches.step()
        if wave % 2:
            batches.between(functools.partial(recording.driver.abort, *rng.sample(names, 2)))
    batches.run()
    steps, requests = recording.read().steps(), recording.read().requests()
    assert max(batches.others) == depth - 1, "one batch was under way at a time"
    assert len(steps) == len(batches.rows)
    for column in ("num_preempted_reqs", "num_kv_blocks_evicted", "num_lookups", "num_recomputed_tokens"):
        assert sum(row[column] for row in batches.rows) > 0, column
    taken = steps["num_kv_blocks_allocated"] + steps["num_kv_blocks_revived"] - steps["num_kv_blocks_freed"]
    assert taken.tolist() == [row["taken"] for row in batches.rows]
    for column in batches.rows[0]:
        if column != "taken":
            assert steps[column].tolist() == [row[column] for row in batches.rows], column
    assert {str(row["request_id"]): int(row["finished_step"]) for row in requests} == batches.ended


@pytest.mark.parametrize("under_way", [1, 2, 3])
@pytest.mark.parametrize("kind", [pipeline, asynchronous])
def test_batches_that_were_under_way_when_recording_began_are_left_out(
    core_model: str, tmp_path: Path, lookups: list[str], kind: Callable[[Any], None], under_way: int
):
    from tests.core.scheduler_here import Driver

    driver = Driver(core_model, change=kind, **SETTINGS)
    batches = Batches(driver, under_way + 1, lookups)
    for length in (200, 90, 60, 30):
        driver.add(list(range(2, 2 + length)), max_tokens=9)
    for _ in range(under_way):
        batches.schedule()
    recording = Recording(driver, tmp_path)
    batches.run()
    steps, later = recording.read().steps(), batches.rows[under_way:]
    assert len(steps) == len(later) > 5
    assert (steps["t_update_ns"] > 0).all()
    for column in ("num_scheduled_tokens", "num_preempted_reqs", "num_kv_blocks_peak", "num_lookups"):
        assert steps[column].tolist() == [row[column] for row in later], column
    recording.recorder.stop()
    recording.recorder.close()
