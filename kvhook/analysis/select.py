"""Exact quantiles of many values without sorting them all: only those of the right bins are looked at closer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[Any]
#: Values, and how often each occurred; None: once.
Part = tuple[Floats, "Ints | None"]

#: Many bins for many values, few for few.
_MANY, _BINS, _SOME_BINS = 1 << 17, 1 << 14, 1 << 9
#: So few values are sorted.
_FEW = 1 << 10


def select(parts: Sequence[Part], ranks: Sequence[int]) -> dict[int, float]:
    """The values that stand at these places, from 0, if all are sorted; there must be so many.

    Each round counts the values in equally wide bins between the smallest and the largest, and goes on with those of
    the bins that the places are in. A value's bin does not go down as the value goes up, so the result is exact.
    """
    count = sum(len(values) for values, _ in parts)
    low = min(float(values.min()) for values, _ in parts if len(values))
    high = max(float(values.max()) for values, _ in parts if len(values))
    bins = _BINS if count > _MANY else _SOME_BINS
    with np.errstate(all="ignore"):
        scale = np.float64(bins - 1) / (high - low)
    if count <= _FEW or not np.isfinite(scale) or not np.isfinite(high - low):
        return _sorted(parts, ranks)
    total = np.zeros(bins)
    for values, counts in parts:
        total += np.bincount(_bins(values, low, scale), counts, bins)
    up_to = np.cumsum(total).astype(np.int64)
    wanted: dict[int, list[int]] = defaultdict(list)
    for rank in ranks:
        wanted[int(np.searchsorted(up_to, rank, side="right"))].append(rank)
    found: dict[int, float] = {}
    for one, inside in wanted.items():
        before = int(up_to[one - 1]) if one else 0
        some = list(_of_bin(parts, one, low, scale))
        deeper = select(some, [rank - before for rank in inside])
        found |= {rank: deeper[rank - before] for rank in inside}
    return found


def _bins(values: Floats, low: float, scale: np.float64) -> npt.NDArray[np.int32]:
    return ((values - low) * scale).astype(np.int32)


def _of_bin(parts: Sequence[Part], one: int, low: float, scale: np.float64) -> Iterator[Part]:
    for values, counts in parts:
        inside = _bins(values, low, scale) == one
        yield values[inside], None if counts is None else counts[inside]


def _sorted(parts: Sequence[Part], ranks: Sequence[int]) -> dict[int, float]:
    values = np.concatenate([v for v, _ in parts])
    order = np.argsort(values, kind="stable")
    counts = np.concatenate([np.ones(len(v), np.int64) if c is None else c for v, c in parts])
    at = np.searchsorted(np.cumsum(counts[order]), ranks, side="right")
    return dict(zip(ranks, values[order[at]].tolist(), strict=True))
