"""A reference model of the prefix cache predicts what kvhook records: look-ups, reasons, evictions, preemptions."""

from __future__ import annotations

import inspect
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.core.conftest import Recording
from tests.core.reference import Model, play

Make = Callable[..., Recording]


def arrivals(seed: int) -> dict[int, list[tuple[list[int], int]]]:
    """Prompts with shared beginnings, in random steps."""
    rng = random.Random(seed)
    trunk = [rng.randrange(2, 500) for _ in range(100)]
    stems = [trunk[: rng.randrange(10, 90)] + [rng.randrange(2, 500) for _ in range(40)] for _ in range(4)]
    coming: dict[int, list[tuple[list[int], int]]] = {}
    for _ in range(60):
        prompt = [rng.randrange(2, 500) for _ in range(rng.randrange(1, 60))]
        if rng.random() < 0.7:
            prompt = rng.choice(stems) + prompt
        coming.setdefault(rng.randrange(300), []).append((prompt, rng.randrange(1, 60)))
    return coming


def model_of(recording: Recording, blocks: int, block_size: int, budget: int, places: int) -> Model:
    scheduler = recording.driver.scheduler
    whole = bool(getattr(scheduler.scheduler_config, "scheduler_reserve_full_isl", False))
    pool = type(recording.driver.pool)
    asks = "prepend" in inspect.signature(pool.free_blocks).parameters  # 0.23: only for sliding windows
    return Model(
        blocks - 1,
        block_size,
        budget,
        places,
        whole=whole,
        empty_first=hasattr(recording.driver.pool.free_block_queue, "prepend_n") and not asks,
    )


@pytest.mark.parametrize("seed", range(6))
def test_the_reference_model_predicts_every_lookup_eviction_and_preemption(driver: Make, seed: int):
    blocks, size, budget, places = [(26, 16, 96, 8), (44, 8, 64, 6), (24, 16, 200, 16)][seed % 3]
    recording = driver(
        blocks=blocks,
        block_size=size,
        max_num_seqs=places,
        max_num_batched_tokens=budget,
        max_model_len=512,
        seed=seed,
    )
    model = model_of(recording, blocks, size, budget, places)
    count = play(recording.driver, model, arrivals(seed))
    cores = recording.read()
    steps, lookups, preemptions = cores.steps(), cores.lookups(), cores.preemptions()

    columns = (
        "step request resumed num_tries num_tokens num_found_tokens miss_reason miss_block evicted_steps evicted_by "
        "num_evicted_tokens"
    )
    recorded = list(zip(*(lookups[c].tolist() for c in columns.split()), strict=True))
    assert sorted(recorded) == sorted(map(tuple, model.lookups))
    reasons = Counter(lookup.reason for lookup in model.lookups)
    assert set(reasons) >= {"never_seen", "evicted", "diverged"}, "the workload is too tame to tell anything"
    assert len({lookup.evicted_tokens for lookup in model.lookups}) > 3

    assert list(zip(*(preemptions[c].tolist() for c in ("step", "request", "num_lost_tokens")), strict=True)) == (
        model.preemptions
    )
    assert model.preemptions

    scheduled = steps[: count + 1]
    for what, column in (
        ("evict", "num_kv_blocks_evicted"),
        ("allocate", "num_kv_blocks_allocated"),
        ("hit", "num_kv_blocks_reused"),
    ):
        happened = Counter(event.step for event in model.events if event.what == what)
        assert scheduled[column].tolist() == [happened[step] for step in scheduled["step"]], what


def one(driver: Make, prompts: list[Any], **settings: Any) -> list[str]:
    """The reasons of the look-ups of prompts that come one after another; None resets the cache."""
    recording = driver(
        **{"blocks": 100, "max_num_seqs": 4, "max_num_batched_tokens": 512, "max_model_len": 512, **settings}
    )
    for prompt in prompts:
        if prompt is None:
            assert recording.driver.scheduler.reset_prefix_cache()
            continue
        tokens, params = prompt if isinstance(prompt, tuple) else (prompt, {})
        recording.driver.add(tokens, max_tokens=2, **params)
        list(recording.driver.run())
    return recording.read().lookups()["miss_reason"].tolist()


LONG = list(range(2, 102))


def test_each_reason_is_told(driver: Make):
    from vllm.v1.request import Request

    assert one(driver, [LONG, LONG]) == ["never_seen", "none"]
    assert one(driver, [LONG, [*LONG[:40], *range(200, 260)]]) == ["never_seen", "diverged"]
    assert one(driver, [LONG[:9], LONG[:9]]) == ["short", "short"]
    assert one(driver, [LONG, None, LONG]) == ["never_seen", "reset"]
    assert one(driver, [LONG, (LONG, {"prompt_logprobs": 1})]) == ["never_seen", "not_looked_up"]
    if "cache_salt" in inspect.signature(Request).parameters:  # from 0.9.0
        assert one(driver, [LONG, (LONG, {"cache_salt": "x"})]) == ["never_seen", "salted"]
    assert one(driver, [LONG, LONG], enable_prefix_caching=False) == ["not_looked_up", "not_looked_up"]
    assert one(driver, [LONG, list(range(300, 400)), LONG], blocks=10) == ["never_seen", "never_seen", "evicted"]


def test_a_look_up_tells_what_its_prompt_shares_with_those_before_it_and_caching_need_not_be_on(driver: Make):
    """30 tokens are shared, and with blocks of 32 none is found; with prefix caching off nothing is even looked up."""
    rng = random.Random(8)
    beginning = [rng.randrange(2, 500) for _ in range(30)]
    prompts = [beginning + [rng.randrange(2, 500) for _ in range(20)] for _ in range(6)]
    prompts += [[*beginning[:10], 1], prompts[0]]
    shared = [0]
    for at, prompt in enumerate(prompts[1:], 1):
        shared.append(
            max(sum(prompt[: n + 1] == o[: n + 1] for n in range(min(len(prompt), len(o)))) for o in prompts[:at])
        )
    assert shared[1] >= 30
    for caching in (True, False):
        recording = driver(blocks=60, block_size=32, enable_prefix_caching=caching, max_model_len=512)
        for prompt in prompts:
            recording.driver.add(prompt, 2)
            for _ in recording.driver.run():
                pass
        lookups = recording.read().lookups()
        assert lookups["num_shared_tokens"].tolist() == shared
        assert lookups["num_found_tokens"].tolist() == [0] * 7 + [32 * caching]
        assert (lookups["miss_reason"] == "not_looked_up").all() == (not caching)
