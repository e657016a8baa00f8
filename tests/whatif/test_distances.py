"""Stack distances give what a cache of each size gives that is asked block by block."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvhook.whatif import distances
from kvhook.whatif.distances import lru_curve
from kvhook.whatif.optimum import optimum
from kvhook.whatif.requests import BlockRequests, make_requests
from tests.whatif.workloads import Sent, lru


def tree_requests(paths: list[list[int]]) -> BlockRequests:
    """Each path is a list of turns in a tree: blocks are equal where the paths are up to there."""
    known: dict[tuple[int, ...], int] = {}
    ids = [[known.setdefault(tuple(path[: i + 1]), len(known)) for i in range(len(path))] for path in paths]
    return make_requests(1, ids, [len(path) + 1 for path in paths])


PATHS = st.lists(st.lists(st.integers(0, 2), min_size=0, max_size=6), min_size=1, max_size=40)


@pytest.fixture(params=["_count", "_count_with_lists", "_count_with_numpy"], autouse=True)
def counter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """All ways of counting; numba compiles the first of them."""
    name: str = request.param
    count = getattr(distances, name)
    monkeypatch.setattr(distances, "_counter", lambda *_: count)
    monkeypatch.setattr(distances, "AT_A_TIME", 7)
    return name


@settings(max_examples=30, deadline=None)
@given(paths=PATHS)
def test_every_size_finds_what_a_cache_of_that_size_finds(paths: list[list[int]]):
    requests = tree_requests(paths)
    curve = lru_curve(requests)
    longest = int(requests.num_blocks.max(initial=0))
    for blocks in range(longest, requests.num_distinct + 2):
        assert curve.at(blocks) == sum(lru(requests, blocks)), blocks


@pytest.mark.parametrize("seed", range(4))
def test_conversations_that_find_generated_blocks_too(seed: int):
    requests = Sent(seed, 120, 4).requests()
    curve = lru_curve(requests)
    for blocks in range(requests.longest, requests.num_distinct + 1, 7):
        assert curve.at(blocks) == sum(lru(requests, blocks))
    assert curve.ceiling == sum(lru(requests, requests.num_distinct)) > curve.at(requests.longest)


def test_engines_and_times_between_resets_begin_with_an_empty_cache():
    requests = Sent(3, 80, 4).requests()
    for name in ("core", "epoch"):
        parts = np.arange(80) // 27
        changed: dict[str, Any] = {name: parts}
        apart = dataclasses.replace(requests, **changed)
        for blocks in (20, 40, 400):
            each = [requests.select(np.flatnonzero(parts == part)) for part in range(3)]
            assert lru_curve(apart).at(blocks) == sum(lru_curve(one).at(blocks) for one in each)


def test_a_request_that_was_not_looked_up_finds_nothing_and_is_found():
    requests = make_requests(4, [[0, 1], [0, 1], [0, 1]], [9, 9, 9], looked_up=[True, False, True])
    assert requests.query_tokens == 18
    assert lru_curve(requests).at(10) == 2


def test_the_last_token_of_a_prompt_is_never_found():
    requests = make_requests(4, [[0, 1], [0, 1]], [8, 8])
    assert lru_curve(requests).ceiling == 1


def test_a_sample_is_within_its_error_of_the_whole():
    rng = np.random.default_rng(5)
    paths = [[int(rng.zipf(1.3)) % 50, *rng.integers(0, 8, 4).tolist()] for _ in range(4000)]
    requests = tree_requests(paths)
    whole, sample = lru_curve(requests), lru_curve(requests, rate=0.3)
    assert len(sample.parts) == distances.PARTS
    for blocks in (200, 1000, 3000):
        assert abs(sample.at(blocks) - whole.at(blocks)) < 4 * max(sample.error(blocks), 0.005 * whole.lookups)
        assert sample.error(blocks) < 0.1 * whole.lookups


def test_many_look_ups_are_sampled_by_themselves(monkeypatch: pytest.MonkeyPatch):
    requests = Sent(1, 200, 4).requests()
    monkeypatch.setattr(distances, "SAMPLE_FROM", 1000)
    curve = lru_curve(requests)
    assert 0 < curve.rate < 1
    assert curve.rate == pytest.approx(1000 / int(requests.num_looked_up_blocks.sum()))


def best_by_trying(requests: BlockRequests, blocks: int) -> int:
    """The most that can be found, by trying every way of evicting."""
    uses = [
        (block, place < asked)
        for number, asked in enumerate(requests.num_looked_up_blocks.tolist())
        for place, block in enumerate(requests.ids[requests.offsets[number] : requests.offsets[number + 1]].tolist())
    ]
    states = {frozenset[int](): 0}
    for block, counted in uses:
        after: dict[Any, int] = {}
        for cache, found in states.items():
            hit = found + (counted and block in cache)
            whole = cache | {block}
            for size in {min(blocks, len(whole)), min(blocks, len(whole) - 1)}:
                for kept in map(frozenset, itertools.combinations(sorted(whole), max(size, 0))):
                    after[kept] = max(after.get(kept, 0), hit)
        states = after
    return max(states.values())


@settings(max_examples=25, deadline=None)
@given(
    paths=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=3), min_size=1, max_size=7),
    blocks=st.integers(1, 5),
)
def test_the_optimum_is_the_most_that_can_be_found(paths: list[list[int]], blocks: int):
    requests = tree_requests(paths)
    assert optimum(requests, blocks) == best_by_trying(requests, blocks)


@pytest.mark.parametrize("seed", range(3))
def test_the_optimum_lies_between_the_curve_and_its_ceiling(seed: int):
    requests = Sent(seed, 150, 4).requests()
    curve = lru_curve(requests)
    for blocks in range(requests.longest, requests.num_distinct, 40):
        assert curve.at(blocks) <= optimum(requests, blocks) <= curve.ceiling
    assert optimum(requests, requests.num_distinct) == curve.ceiling
