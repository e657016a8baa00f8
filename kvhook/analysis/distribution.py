"""Exact distributions from values and how often each occurred."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Distribution:
    """Count, mean, median, p90, p99 and largest of a set of values, in the unit of the values.

    Exact, from the values themselves and not from buckets. All but `count` are NaN without values.
    """

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


#: Of no values.
NOTHING = Distribution(0, *[float("nan")] * 5)


def distribution(values: npt.ArrayLike, counts: npt.ArrayLike | None = None) -> Distribution:
    """Describe values, each of which occurred `counts` times (once, if not given)."""
    v = np.asarray(values, np.float64)
    c = np.ones(len(v), np.int64) if counts is None else np.asarray(counts, np.int64)
    keep = (c > 0) & ~np.isnan(v)
    v, c = v[keep], c[keep]
    if not len(v):
        return NOTHING
    total = int(c.sum())
    p50, p90, p99 = quantiles(v, c, (0.5, 0.9, 0.99))
    return Distribution(total, float((v * c).sum() / total), p50, p90, p99, float(v.max()))


def quantiles(values: Floats, counts: Ints, at: tuple[float, ...]) -> tuple[float, ...]:
    """Quantiles of ``np.repeat(values, counts)`` without making that array.

    Args:
        values: shape (n,), in any order, n > 0.
        counts: shape (n,), all positive.
        at: fractions from 0 to 1.

    Returns:
        What ``np.quantile(..., method="linear")`` gives: between two neighbours the straight line (Hyndman and Fan
        1996, definition 7).
    """
    order = np.argsort(values, kind="stable")
    sorted_values, last = values[order], np.cumsum(counts[order])
    position = np.asarray(at) * (last[-1] - 1)
    below = np.floor(position)
    low = sorted_values[np.searchsorted(last, below, side="right")]
    high = sorted_values[np.searchsorted(last, np.ceil(position), side="right")]
    return tuple((low + (high - low) * (position - below)).tolist())
