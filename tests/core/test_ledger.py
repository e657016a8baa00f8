"""The ledger of blocks says event by event what the reference model of the prefix cache predicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.core.conftest import Recording
from tests.core.reference import play
from tests.core.test_lookups import arrivals, model_of

Make = Callable[..., Recording]


@pytest.mark.parametrize("seed", range(3))
def test_every_event_of_every_block_is_as_predicted(driver: Make, seed: int):
    blocks, size, budget, places = [(26, 16, 96, 8), (44, 8, 64, 6), (24, 16, 200, 16)][seed]
    recording = driver(
        ledger=True,
        blocks=blocks,
        block_size=size,
        max_num_seqs=places,
        max_num_batched_tokens=budget,
        max_model_len=512,
        seed=seed,
    )
    model = model_of(recording, blocks, size, budget, places)
    play(recording.driver, model, arrivals(seed))
    cores = recording.read()
    events = cores.blocks()
    recorded = list(zip(*(events[c].tolist() for c in ("event", "step", "request", "block")), strict=True))
    assert recorded == model_order(recorded, [tuple(event) for event in model.events])
    assert {event.what for event in model.events} == {"allocate", "hit", "cache", "free", "evict"}
    digests_tell_the_content(events, model)


def model_order(recorded: list[Any], predicted: list[Any]) -> list[Any]:
    """The prediction, with events that vLLM makes in one go for several blocks in vLLM's order: it evicts all blocks of
    an allocation and then hands them out, or block by block, as the release does."""
    assert sorted(recorded) == sorted(predicted)
    order = {"evict": 0, "allocate": 0}
    together = [(e[1], e[2], order.get(e[0], e[0])) for e in predicted]
    assert [(e[1], e[2], order.get(e[0], e[0])) for e in recorded] == together
    return recorded


def digests_tell_the_content(events: Any, model: Any) -> None:
    """Equal digests are equal prefixes, and the other way round."""
    cached = events[events["event"] == "cache"]
    contents = model.contents
    assert len(cached) == len(contents)
    pairs = set(zip(cached["digest"].tolist(), contents, strict=True))
    assert len(pairs) == len({digest for digest, _ in pairs}) == len({content for _, content in pairs})
    assert [len(content) // model.size - 1 for content in contents] == cached["index"].tolist()
    assert (events["digest"][events["event"] == "allocate"] == 0).all()
    assert (events["digest"][np.isin(events["event"], ("hit", "evict"))] != 0).all()


def test_no_token_is_in_the_files_and_two_runs_have_different_digests(driver: Make):
    prompt = [77] * 64
    runs = []
    for _ in range(2):
        recording = driver(ledger=True, blocks=50, max_num_seqs=4, max_num_batched_tokens=128, max_model_len=256)
        recording.driver.add(prompt, max_tokens=3)
        list(recording.driver.run())
        runs.append(recording.read().blocks())
    assert len(runs[0]) == len(runs[1])
    digests = [set(run["digest"].tolist()) - {0} for run in runs]
    assert digests[0]
    assert not digests[0] & digests[1]


def test_a_reset_is_an_event_of_each_block_that_could_be_found(driver: Make):
    recording = driver(ledger=True, blocks=50, max_num_seqs=4, max_num_batched_tokens=128, max_model_len=256)
    recording.driver.add(list(range(2, 66)), max_tokens=2)
    list(recording.driver.run())
    findable = sum(1 for block in recording.driver.pool.blocks if block.block_hash is not None)
    assert recording.driver.scheduler.reset_prefix_cache()
    recording.recorder.stop()
    events = recording.read().blocks()
    assert findable == 4
    assert (events["event"] == "reset").sum() == findable


def test_with_the_ledger_the_counts_of_the_steps_are_the_same(driver: Make):
    kept = []
    for ledger in (False, True):
        recording = driver(
            ledger=ledger, blocks=26, max_num_seqs=8, max_num_batched_tokens=96, max_model_len=512, seed=2
        )
        play(recording.driver, model_of(recording, 26, 16, 96, 8), arrivals(2))
        steps = recording.read().steps()
        timeless = [n for n in steps.dtype.names or () if not n.startswith("t_") and n != "kvhook_ns"]
        kept.append(steps[timeless].tolist())
    assert kept[0] == kept[1]


def test_without_it_there_are_no_events(driver: Make):
    recording = driver(blocks=50, max_num_seqs=4, max_num_batched_tokens=128, max_model_len=256)
    recording.driver.add([5] * 40, max_tokens=2)
    list(recording.driver.run())
    assert len(recording.read().blocks()) == 0
