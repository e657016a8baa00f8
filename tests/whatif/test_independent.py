"""The curve against a cache simulator that others wrote: libCacheSim (PyPI: libcachesim), given the same hash ids."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvhook.whatif.distances import lru_curve
from kvhook.whatif.requests import BlockRequests
from tests.whatif.workloads import Sent


def found_by_libcachesim(requests: BlockRequests, blocks: int) -> int:
    """Blocks that are found when each request asks for its blocks from the first on, and gives back the last first."""
    # it needs GLib on the machine
    lcs = pytest.importorskip("libcachesim", exc_type=ImportError)
    cache, ask = lcs.LRU(cache_size=blocks), lcs.Request()
    ask.obj_size = 1
    found = 0
    asked = requests.num_looked_up_blocks.tolist()
    for number in range(len(requests)):
        mine = requests.ids[requests.offsets[number] : requests.offsets[number + 1]].tolist()
        for place, block in enumerate(mine):
            ask.obj_id = block + 1
            found += bool(cache.get(ask)) and place < asked[number]
        for block in reversed(mine):
            ask.obj_id = block + 1
            cache.get(ask)
    return found


@pytest.mark.parametrize("seed", [11, 12])
def test_an_independent_simulator_finds_as_much(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # it makes a folder there as soon as it is imported
    requests = Sent(seed, 300, 4).requests()
    curve = lru_curve(requests)
    sizes = range(requests.longest, requests.num_distinct + 100, 120)
    assert [curve.at(blocks) for blocks in sizes] == [found_by_libcachesim(requests, blocks) for blocks in sizes]
    assert curve.at(sizes[0]) < curve.at(sizes[-1])
