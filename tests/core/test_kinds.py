"""Models beyond plain attention: what is counted is right, and what cannot be said is absent with a reason."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.core.books import Books
from tests.core.conftest import Recording
from tests.core.scheduler_here import SPECS

Make = Callable[..., Recording]

#: Settings under which blocks run short.
SHORT = {"max_num_seqs": 8, "max_num_batched_tokens": 96, "max_model_len": 512}
KINDS: dict[str, tuple[str, ...]] = {
    "sliding window": ("sliding",),
    "full and sliding": ("full", "sliding"),
    "full, sliding and sliding": ("full", "sliding", "sliding"),
    "full and mamba": ("full", "mamba"),
}
COUNTS = (
    "num_scheduled_tokens",
    "num_scheduled_reqs",
    "num_preempted_reqs",
    "num_running_reqs",
    "num_kv_blocks_peak",
    "num_kv_blocks_cached",
    "num_kv_blocks_empty",
    "num_kv_blocks_used",
)


def record(
    driver: Make, kind: str, seed: int, look: Callable[[Recording], None] = lambda recording: None, **more: Any
) -> tuple[Recording, Books]:
    """A run under which blocks run short. `look` is called when a step was scheduled."""
    blocks = 40 * len(KINDS[kind])
    try:
        recording = driver(blocks=blocks, seed=seed, groups=KINDS[kind], **SHORT, **more)
    except (AssertionError, NotImplementedError, AttributeError, TypeError, ValueError) as error:
        pytest.skip(f"this vLLM has no such cache: {type(error).__name__}: {error}")
    rng, books = random.Random(seed), Books(recording.driver, plain=False)
    stem = [rng.randrange(2, 500) for _ in range(100)]
    for _ in range(25):
        tail = [rng.randrange(2, 500) for _ in range(rng.randrange(5, 100))]
        recording.driver.add(stem + tail if rng.random() < 0.5 else tail, max_tokens=rng.randrange(1, 60))
    schedule = recording.driver.schedule

    def looked() -> Any:
        output = schedule()
        look(recording)
        return output

    recording.driver.schedule = looked
    try:
        books.run()
    except AssertionError as error:
        if "MambaManager should only allocate" in str(error):  # 0.9
            pytest.skip("this vLLM keeps one Mamba block for each request, and none beside blocks of another kind")
        raise
    return recording, books


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_and_tokens_of_every_step_are_what_the_core_holds(driver: Make, kind: str):
    recording, books = record(driver, kind, 1)
    steps = recording.read().steps()
    assert len(steps) == len(books.rows)
    for column in COUNTS:
        assert steps[column].tolist() == [row[column] for row in books.rows], column
    taken = steps["num_kv_blocks_allocated"] + steps["num_kv_blocks_revived"] - steps["num_kv_blocks_freed"]
    assert (np.cumsum(taken) == steps["num_kv_blocks_used"]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_in_blocks_are_absent_with_a_reason_and_the_kinds_of_work_are_not(driver: Make, kind: str):
    recording, _ = record(driver, kind, 2)
    cores = recording.read()
    assert "num_kv_tokens" in cores.absent
    assert "num_kv_tokens" not in (cores.steps().dtype.names or ())
    steps, requests = cores.steps(), cores.requests()
    kinds = ("num_prefill_tokens", "num_recomputed_tokens", "num_decode_tokens", "num_spec_tokens")
    assert (np.sum([steps[k] for k in kinds], axis=0) == steps["num_scheduled_tokens"]).all()
    for column in ("num_prefill_tokens", "num_recomputed_tokens"):
        assert requests[column].sum() == steps[column].sum()
    (facts,) = cores.facts
    assert [group["kind"] for group in facts["kv_groups"]] == [SPECS[one] for one in KINDS[kind]]


@pytest.mark.parametrize("kind", KINDS)
def test_the_ledger_of_several_groups_is_consistent(driver: Make, kind: str):
    recording, _ = record(driver, kind, 3, ledger=True)
    cores = recording.read()
    steps, events = cores.steps(), cores.blocks()
    for event, column in (
        ("allocate", "num_kv_blocks_allocated"),
        ("hit", "num_kv_blocks_reused"),
        ("free", "num_kv_blocks_freed"),
        ("evict", "num_kv_blocks_evicted"),
    ):
        assert (events["event"] == event).sum() == steps[column].sum(), event
    assert set(events["group"].tolist()) <= set(range(len(KINDS[kind])))


@pytest.mark.parametrize("kind", KINDS)
def test_every_block_was_taken_for_the_group_that_holds_it(driver: Make, kind: str):
    """Of each block that a step took and still has at its end, vLLM's managers of the groups say which one holds it."""
    seen: list[dict[int, int]] = []

    def look(recording: Recording) -> None:
        coordinator = getattr(recording.driver.scheduler.kv_cache_manager, "coordinator", None)
        managers = getattr(coordinator, "single_type_managers", ())
        seen.append(
            {b.block_id: i for i, m in enumerate(managers) for blocks in m.req_to_blocks.values() for b in blocks}
        )

    recording, _ = record(driver, kind, 5, look=look, ledger=True)
    events = recording.read().blocks()
    null = recording.driver.pool.null_block.block_id
    # the last taking of a block counts: a step may give one back and take it again
    taken = {(int(e["step"]), int(e["block"])): int(e["group"]) for e in events if e["event"] == "allocate"}
    told = [(seen[step][b], group) for (step, b), group in taken.items() if b in seen[step] and b != null]
    assert len(told) > 50
    assert {group for group, _ in told} == set(range(len(KINDS[kind])))
    assert [group for _, group in told] == [group for group, _ in told]
    # a block keeps its group until it is taken again
    held: dict[int, int] = {}
    for e in events:
        if e["event"] == "allocate":
            held[int(e["block"])] = int(e["group"])
        assert held[int(e["block"])] == e["group"], e


def test_a_miss_with_several_groups_has_no_reason_that_might_be_wrong(driver: Make):
    recording, _ = record(driver, "full and sliding", 4)
    reasons = set(recording.read().lookups()["miss_reason"].tolist())
    assert reasons <= {"none", "short", "unknown", "not_looked_up"}


def test_data_parallel_ranks_say_who_they_are(driver: Make):
    def rank(config: Any) -> None:
        """As vLLM does in the process of rank 3, if the model is no mixture of experts."""
        parallel = config.parallel_config
        if hasattr(parallel, "data_parallel_index"):  # from 0.14
            parallel.data_parallel_index, parallel.data_parallel_rank = 3, 0
        else:
            parallel.data_parallel_rank = 3

    for change, number in ((lambda config: None, 0), (rank, 3)):
        (facts,) = driver(blocks=40, change=change, **SHORT).read().facts
        assert (facts["data_parallel_rank"], facts["data_parallel_size"]) == (number, 1)
