"""What is derived from the ledger of blocks, against a reference model of an LRU prefix cache: block by block."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvhook.analysis.core_report import report
from kvhook.core_schema import BLOCK_EVENT_FIELDS
from kvhook.records.block_lives import block_lives, prefixes, steps_between_uses
from tests.core.conftest import Recording
from tests.core.derived import Derived, derive
from tests.core.reference import Model, Request, play
from tests.core.test_lookups import arrivals, model_of

Make = Callable[..., Recording]
SIZE = 8


def simulate(seed: int) -> Model:
    """The reference model alone, on a random workload of prompts that share their beginnings."""
    rng = random.Random(seed)
    model = Model(30, SIZE, 96, 6, whole=bool(seed % 2), empty_first=bool(seed // 2 % 2))
    coming, live = arrivals(seed), dict[int, tuple[Request, list[int], int]]()
    number = 0
    for step in range(5000):
        for prompt, most in coming.get(step, ()):
            tokens = list(prompt)
            request = Request(number, lambda tokens=tokens: tokens)  # type: ignore[misc]
            live[number] = request, tokens, len(tokens) + most
            model.waiting.append(request)
            number += 1
        if not live and step > max(coming):
            return model
        scheduled = model.schedule()
        for request, tokens, end in list(live.values()):
            if scheduled.get(request.number) and request.computed >= len(tokens):
                tokens.append(rng.randrange(2, 500))
                if len(tokens) >= end:
                    model.finish(request)
                    del live[request.number]
    raise AssertionError("no end")


def ledger_of(model: Model) -> Any:
    """The model's events as a ledger, with digests of its contents."""
    types = [("core", "<i8")] + [
        (n, "U10" if n == "event" else "<u8" if n == "digest" else "<i8") for n, _, _ in BLOCK_EVENT_FIELDS
    ]
    rows, holds = list[tuple[Any, ...]](), dict[int, tuple[int, ...]]()
    contents, number = iter(model.contents), dict[tuple[int, ...], int]()
    for event in model.events:
        index = -1
        if event.what == "cache":
            content = holds[event.block] = next(contents)
            index = len(content) // model.size - 1
        digest = number.setdefault(holds[event.block], len(number) + 1) if event.block in holds else 0
        rows.append((0, event.step, event.request, event.block, index, event.what, 0, digest))
        if event.what == "evict":
            del holds[event.block]
    return np.array(rows, types)


def the_same(events: Any, expected: Derived, size: int) -> None:
    """All that is derived from a ledger is what the naive walk found."""
    lives, tree = block_lives(events), prefixes(events, {0: size})
    columns = "block request index cached_step last_used_step freed_step evicted_step num_hits asked_again_step"
    recorded = list(zip(*(lives[c].tolist() for c in columns.split()), strict=True))
    assert recorded == [
        (x.block, x.request, len(x.content) // size - 1, x.cached, x.used, x.freed, x.evicted, x.hits, x.again)
        for x in expected.lives
    ]
    assert (lives["reset_step"] == -1).all()
    assert Counter(steps_between_uses(events).tolist()) == Counter(expected.between)
    # digests are names of contents
    name = {int(digest): life.content for digest, life in zip(lives["digest"], expected.lives, strict=True)}
    assert len(set(name.values())) == len(name)
    told = {name[int(p["digest"])]: (int(p["num_tokens"]), int(p["num_requests"]), int(p["num_hits"])) for p in tree}
    assert told == {
        content: (len(content), len(requests), expected.found.get(content, 0))
        for content, requests in expected.requests.items()
    }
    parents = {name[int(p["digest"])]: name.get(int(p["parent"]), ()) for p in tree}
    assert parents == {content: content[:-size] for content in expected.requests}


@pytest.mark.parametrize("seed", range(8))
def test_lives_reuse_distances_and_prefixes_are_what_a_naive_walk_through_an_lru_cache_finds(seed: int):
    model = simulate(seed)
    expected = derive(model)
    assert len(expected.evicted) > 50
    assert any(life.again >= 0 for life in expected.lives)
    assert any(life.hits > 2 for life in expected.lives)
    the_same(ledger_of(model), expected, SIZE)


def test_a_ledger_that_begins_in_the_middle_has_lives_without_a_beginning():
    model = simulate(1)
    events = ledger_of(model)
    half = events[len(events) // 2 :]
    whole, cut = block_lives(events), block_lives(half)
    begun = cut[cut["cached_step"] >= 0]
    assert len(cut) > len(begun) > 0
    assert (cut["request"][cut["cached_step"] < 0] == -1).all()
    later = whole[-len(begun) :]
    for column in ("block", "digest", "cached_step", "evicted_step", "num_hits"):
        assert begun[column].tolist() == later[column].tolist()


def test_an_empty_ledger_has_no_lives():
    events = ledger_of(simulate(0))[:0]
    assert len(block_lives(events)) == len(prefixes(events, {0: 8})) == len(steps_between_uses(events)) == 0


@pytest.mark.parametrize("seed", range(3))
def test_the_ledger_of_vllms_own_scheduler_tells_what_the_reference_model_predicts(driver: Make, seed: int):
    blocks, size, budget, places = [(26, 16, 96, 8), (44, 8, 64, 6), (24, 16, 200, 16)][seed]
    settings = {"max_num_seqs": places, "max_num_batched_tokens": budget, "max_model_len": 512, "seed": seed}
    recording = driver(ledger=True, blocks=blocks, block_size=size, **settings)
    model = model_of(recording, blocks, size, budget, places)
    play(recording.driver, model, arrivals(seed))
    expected, cores = derive(model), recording.read()
    the_same(cores.blocks(), expected, size)

    found = report(cores).blocks
    assert found is not None
    evicted = expected.evicted
    for told, values in (
        (found.lifetime, [life.evicted - life.cached for life in evicted]),
        (found.idle_before_eviction, [life.evicted - life.freed for life in evicted]),
        (found.steps_between_uses, expected.between),
    ):
        assert told == pytest.approx(tuple(np.percentile(values, (50, 90, 99))))
    assert found.reuses == dict(sorted(Counter(life.hits for life in expected.lives).items()))
    again = sum(life.again >= 0 for life in evicted)
    assert (found.num_evicted, found.num_evicted_too_early) == (len(evicted), again)
    assert found.evicted_too_early == pytest.approx(again / len(evicted))
    assert 0 < again < len(evicted)


def test_the_longest_shared_prefixes_are_told_once(driver: Make):
    recording = driver(ledger=True, blocks=200, max_num_seqs=16, max_num_batched_tokens=512, max_model_len=512)
    stem, branch = list(range(2, 66)), list(range(100, 132))
    for i in range(6):  # 64 tokens are shared by six, 96 by four of them
        recording.driver.add(stem + (branch if i < 4 else []) + [400 + i] * 20, max_tokens=2)
    list(recording.driver.run())
    found = report(recording.read()).blocks
    assert found is not None
    assert [(p.num_tokens, p.num_requests) for p in found.shared_prefixes] == [(64, 6), (96, 4)]


def test_bytes_are_those_of_the_cache_that_vllm_makes(driver: Make):
    """Of a tensor for each layer, as the worker would allocate them."""
    recording = driver(blocks=50, max_num_seqs=4, max_num_batched_tokens=64, max_model_len=256)
    (facts,) = recording.read().facts
    spec = recording.driver.scheduler.kv_cache_config.kv_cache_groups[0].kv_cache_spec
    assert [group["page_bytes"] for group in facts["kv_groups"]] == [spec.page_size_bytes]
