"""The hit-rate curve of a least-recently-used cache for all sizes at once, by stack distances (Mattson, 1970).

A block is found in a cache of so many blocks if, since its last use, fewer other blocks were used. How many is asked
of a Fenwick tree. Blocks that were last used by the same request and are used again by the same request lie next to
each other in the order of use, and are asked for together: the tree has one place for each request, not for each block.

The order of use is vLLM's: a request holds all its blocks until it ends, and then gives back the last one first, so
that of its blocks the first is the last to be evicted. What is computed here is a cache that holds blocks and nothing
else; what running requests take from it, and what is kept twice, `kvhook.whatif.replay` knows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvhook.whatif.requests import BlockRequests, Ints

#: From so many requests on numba is used, if it is installed: before, compiling takes longer than what it saves.
COMPILE_FROM = 50_000
#: Without numba, requests of fewer blocks than this are counted block by block, and longer ones with numpy.
SHORT = 48
#: So many requests are made lists of at a time.
AT_A_TIME = 20_000
#: Beyond so many look-ups a sample of the blocks is taken.
SAMPLE_FROM = 100_000_000
#: The sample is taken in so many parts, whose differences tell the error.
PARTS = 8


@dataclass(frozen=True)
class Curve:
    """Blocks found, by the size of the cache.

    Attributes:
        found: ``found[n]`` blocks are found with room for ``n``; of the sample, if it is one.
        lookups: blocks that were looked up, sampled or not.
        rate: share of the blocks that are in the sample; 1 without one.
        parts: the curves of the parts of the sample, to tell the error from.
    """

    found: npt.NDArray[np.float64]
    lookups: int
    rate: float = 1.0
    parts: tuple[Curve, ...] = ()

    def at(self, blocks: int) -> float:
        """Blocks found with room for so many."""
        place = min(int(blocks * self.rate), len(self.found) - 1)
        return float(self.found[max(place, 0)]) / self.rate

    def error(self, blocks: int) -> float:
        """The standard error of `at`, in blocks; 0 without a sample."""
        if not self.parts:
            return 0.0
        found = np.array([part.at(blocks) for part in self.parts])
        return float(found.std(ddof=1) / np.sqrt(len(found)))

    @property
    def ceiling(self) -> float:
        """Blocks found in a cache that never evicts."""
        return float(self.found[-1]) / self.rate

    def smallest(self, share: float) -> int:
        """The smallest size that finds this share of the ceiling."""
        return int(np.ceil(np.searchsorted(self.found, share * self.found[-1] - 1e-9) / self.rate))


def lru_curve(requests: BlockRequests, rate: float | None = None) -> Curve:
    """The curve of a run.

    Args:
        requests: of the run.
        rate: share of the blocks to look at (SHARDS, Waldspurger 2015); all of them if it is not given, unless there
            are more than `SAMPLE_FROM` look-ups.
    """
    lookups = int(requests.num_looked_up_blocks.sum())
    if rate is None:
        rate = min(1.0, SAMPLE_FROM / lookups) if lookups else 1.0
    within = np.arange(len(requests.ids)) - np.repeat(requests.offsets[:-1], requests.num_blocks)
    counted = within < np.repeat(requests.num_looked_up_blocks, requests.num_blocks)
    if rate >= 1:
        return Curve(_found(requests, requests.offsets, requests.ids, counted), lookups)
    hashes = _hash(requests.ids)
    parts = []
    for number in range(PARTS):
        first, end = (np.uint64(rate * (number + i) / PARTS * 2**63) for i in (0, 1))
        parts.append(_sampled(requests, counted, (hashes >= first) & (hashes < end), lookups, rate / PARTS))
    whole = _sampled(requests, counted, hashes < np.uint64(rate * 2**63), lookups, rate)
    return Curve(whole.found, lookups, rate, tuple(parts))


def _sampled(
    requests: BlockRequests, counted: npt.NDArray[np.bool_], chosen: npt.NDArray[np.bool_], lookups: int, rate: float
) -> Curve:
    """The curve of some blocks, with as many look-ups as there should be in a sample of this rate (SHARDS-adj): the
    difference is that of blocks asked for very often, which are found in the smallest cache."""
    before = np.concatenate(([0], np.cumsum(chosen)))
    ids = np.unique(requests.ids[chosen], return_inverse=True)[1].astype(np.int64)
    found = _found(requests, before[requests.offsets].astype(np.int64), ids, counted[chosen])
    found[1:] += lookups * rate - int(counted[chosen].sum())
    return Curve(np.maximum(found, 0), lookups, rate)


def _hash(ids: Ints) -> npt.NDArray[np.uint64]:
    """63 well mixed bits of each id (splitmix64)."""
    x = ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) >> np.uint64(1)


def _found(
    requests: BlockRequests, offsets: Ints, ids: Ints, counted: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float64]:
    """``found[n]``, summed up over engine cores and the times between resets: each begins with an empty cache."""
    distinct = int(ids.max(initial=-1)) + 1
    rises = np.zeros(distinct + 2, np.int64)
    queried = np.add.reduceat(np.concatenate((counted, [False])), offsets[:-1]) if len(offsets) > 1 else np.empty(0)
    queried = np.where(np.diff(offsets) > 0, queried, 0).astype(np.int64)
    lives = requests.core * (int(requests.epoch.max(initial=0)) + 1) + requests.epoch
    count = _counter(len(requests), len(ids) / max(len(requests), 1))
    for life in np.unique(lives).tolist():
        places = np.flatnonzero(lives == life)
        count(places, offsets, ids, queried, np.full(distinct, -1, np.int64), rises)
    return np.cumsum(np.cumsum(rises)[:-1]).astype(np.float64)


def _counter(num_requests: int, num_blocks: float) -> Callable[..., None]:
    if num_requests >= COMPILE_FROM:
        compiled = _compiled()
        if compiled is not None:
            return compiled
    return _count_with_lists if num_blocks < SHORT else _count_with_numpy


@functools.cache
def _compiled() -> Callable[..., None] | None:
    """`_count` as machine code; None without numba (``pip install "kvhook[fast]"``)."""
    try:
        from numba import njit
    except ImportError:
        return None
    function: Callable[..., None] = njit(cache=False, nogil=True)(_count)
    return function


def _count(places: Any, offsets: Any, ids: Any, queried: Any, last: Any, rises: Any) -> None:
    """Add the look-ups of some requests to a histogram of distances.

    Args:
        places: the requests, in order.
        offsets: where the ids of each begin.
        ids: of the blocks.
        queried: how many of each request's blocks are looked up.
        last: id -> the request that used it last, -1 at first; changed.
        rises: ``rises[d]`` is by how much more look-ups have the distance ``d`` than ``d - 1``; changed.
    """
    n = len(places)
    tree = np.zeros(n + 1, np.int64)
    alive = 0
    for now in range(n):
        request = places[now]
        begin, end = offsets[request], offsets[request + 1]
        asked = begin + queried[request]
        at = begin
        while at < end:
            user = last[ids[at]]
            if user < 0:
                break
            first = at
            while at < end and last[ids[at]] == user:
                at += 1
            older = 0
            place = user + 1
            while place > 0:
                older += tree[place]
                place -= place & -place
            place = user + 1
            while place <= n:
                tree[place] -= at - first
                place += place & -place
            hits = min(at, asked) - first
            if hits > 0:
                rises[alive - older + 1] += 1
                rises[alive - older + 1 + hits] -= 1
        alive += end - at
        for place in range(begin, end):
            last[ids[place]] = now
        place = now + 1
        while place <= n:
            tree[place] += end - begin
            place += place & -place


def _count_with_lists(places: Any, offsets: Any, ids: Any, queried: Any, last: Any, rises: Any) -> None:
    """The same as `_count`, with lists: for requests so short that a call of numpy takes longer than their blocks."""
    n = len(places)
    tree, users, alive = [0] * (n + 1), last.tolist(), 0
    for begin in range(0, n, AT_A_TIME):
        up: list[int] = []
        down: list[int] = []
        some = places[begin : begin + AT_A_TIME]
        for now, mine, asked in zip(range(begin, n), _lists(ids, offsets, some), queried[some].tolist(), strict=False):
            at, end = 0, len(mine)
            while at < end:
                user = users[mine[at]]
                if user < 0:
                    break
                first = at
                at += 1
                while at < end and users[mine[at]] == user:
                    at += 1
                older, place = 0, user + 1
                while place > 0:
                    older += tree[place]
                    place &= place - 1
                place, fewer = user + 1, at - first
                while place <= n:
                    tree[place] -= fewer
                    place += place & -place
                hits = min(at, asked) - first
                if hits > 0:
                    up.append(alive - older + 1)
                    down.append(alive - older + 1 + hits)
            alive += end - at
            for block in mine:
                users[block] = now
            place = now + 1
            while place <= n:
                tree[place] += end
                place += place & -place
        np.add.at(rises, np.array(up, np.int64), 1)
        np.add.at(rises, np.array(down, np.int64), -1)


def _lists(ids: Any, offsets: Any, places: Any) -> Iterator[list[int]]:
    """The blocks of some requests."""
    for first, end in zip(offsets[places].tolist(), offsets[places + 1].tolist(), strict=True):
        yield ids[first:end].tolist()


def _count_with_numpy(places: Any, offsets: Any, ids: Any, queried: Any, last: Any, rises: Any) -> None:
    """The same as `_count`, with the work on a request's blocks left to numpy."""
    n = len(places)
    tree, alive = [0] * (n + 1), 0
    up, down = [], []
    begins, ends, asks = (a.tolist() for a in (offsets[places], offsets[places + 1], queried[places]))
    for now in range(n):
        begin, end, asked = begins[now], ends[now], asks[now]
        mine = ids[begin:end]
        users = last[mine]
        changes = (np.flatnonzero(users[1:] != users[:-1]) + 1).tolist()
        at, known = 0, end - begin
        for first, after in zip([0, *changes], [*changes, end - begin], strict=True):
            user = int(users[first]) if after > first else -1
            if user < 0:
                known = first
                break
            older, place = 0, user + 1
            while place > 0:
                older += tree[place]
                place -= place & -place
            place = user + 1
            while place <= n:
                tree[place] -= after - first
                place += place & -place
            at = after
            hits = min(at, asked) - first
            if hits > 0:
                up.append(alive - older + 1)
                down.append(alive - older + 1 + hits)
        alive += end - begin - known
        last[mine] = now
        place = now + 1
        while place <= n:
            tree[place] += end - begin
            place += place & -place
    np.add.at(rises, np.array(up, np.int64), 1)
    np.add.at(rises, np.array(down, np.int64), -1)
