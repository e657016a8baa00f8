"""What a source says at one moment, in one shape for all of them."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from kvhook.analysis.distribution import Distribution, distribution
from kvhook.analysis.history import History
from kvhook.analysis.values import Values
from kvhook.collector.names import TIMES, V0_RATE, VALUES

PREFIX_CACHING_OFF = "prefix caching is off in this engine (enable_prefix_caching=False): nothing is looked up"
NOTHING_LOOKED_UP = "no prompt token has been looked up yet"


class Unavailable(Exception):
    """A source cannot be read; the message says why."""


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Counts as Prometheus has them: each bucket holds the values up to its bound, those of the smaller ones too."""

    count: int
    sum: float
    buckets: dict[str, int]
    #: from the values themselves; None where a source has buckets only
    exact: Distribution | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values. Means and percentiles are in seconds, None without values."""
        out: dict[str, Any] = {"count": self.count, "sum": self.sum, "buckets": dict(self.buckets)}
        out["mean"] = self.sum / self.count if self.count else None
        if self.exact is not None and self.exact.count:
            out |= {name: getattr(self.exact, name) for name in ("p50", "p90", "p99", "max")}
        return out


def histogram_of(values: Values, bounds: tuple[float, ...]) -> Histogram:
    """Values as a histogram with these bounds."""
    counts = values.up_to(np.asarray(bounds)) if values.count else [0] * len(bounds)
    buckets = {str(bound): count for bound, count in zip(bounds, counts, strict=True)}
    return Histogram(values.count, values.sum, buckets | {"+Inf": values.count}, values.describe())


def histogram(
    values: npt.NDArray[np.float64], counts: npt.NDArray[np.int64] | None, bounds: tuple[float, ...]
) -> Histogram:
    """Exact values as a histogram with these bounds."""
    counts = np.ones(len(values), np.int64) if counts is None else counts
    known = values == values
    values, counts = values[known], counts[known]
    order = np.argsort(values, kind="stable")
    up_to = np.concatenate(([0], np.cumsum(counts[order])))
    at = np.searchsorted(values[order], bounds, side="right")
    buckets = {str(bound): int(up_to[i]) for bound, i in zip(bounds, at, strict=True)}
    total = int(up_to[-1])
    return Histogram(total, float((values * counts).sum()), buckets | {"+Inf": total}, distribution(values, counts))


@dataclasses.dataclass
class Reading:
    """What one source gave. ``absent`` says of every value that is not in ``values``, and of every histogram that is
    not in ``histograms``, why."""

    source: str
    values: dict[str, float]
    absent: dict[str, str]
    histograms: dict[str, Histogram]
    #: the source's own words: metrics, or the last step
    raw: dict[str, Any]
    #: None where it is not known
    prefix_caching: bool | None
    #: since when totals count
    since: str
    #: reads the whole past, where the source keeps it; its timestamps are not set
    past: Callable[[], History] | None = None
    t: float = dataclasses.field(default_factory=time.monotonic)
    timestamp: float = dataclasses.field(default_factory=time.time)

    @functools.cached_property
    def rows(self) -> History | None:
        """The whole past, where the source keeps it. It is read when it is asked for."""
        return None if self.past is None else self.past()

    def __post_init__(self) -> None:
        rate, why = hit_rate(self.values, self.absent, self.prefix_caching)
        if rate is None:
            self.absent["prefix_cache_hit_rate"] = why
        else:
            self.values["prefix_cache_hit_rate"] = rate
        for value in VALUES:
            if value.name == V0_RATE and "prefix_cache_queries" in self.values:
                self.absent.pop(V0_RATE, None)  # the token counters are the better answer to the same question
            elif value.name not in self.values:
                self.absent.setdefault(value.name, f"{self.source} does not have it")
        for times in TIMES:
            if times.name not in self.histograms:
                self.absent.setdefault(times.name, f"{self.source} does not have it")


def hit_rate(values: dict[str, float], absent: dict[str, str], prefix_caching: bool | None) -> tuple[float | None, str]:
    """The share of looked-up prompt tokens that were found; or None, and why there is none.

    It is made of the two token counters and nothing else (in V0, which has no counters, it is V0's own rate over
    blocks). Without prefix caching there is no rate, rather than one of 0.
    """
    if prefix_caching is False:
        return None, PREFIX_CACHING_OFF
    queries, hits = values.get("prefix_cache_queries"), values.get("prefix_cache_hits")
    if queries is None or hits is None:
        rate = values.get(V0_RATE)
        if rate is None:
            return None, absent.get("prefix_cache_queries", "this source has no prefix cache counters")
        return (rate, "") if 0 <= rate <= 1 else (None, PREFIX_CACHING_OFF)
    if not queries:
        return None, NOTHING_LOOKED_UP
    if not 0 <= hits <= queries:
        return None, f"{hits} hits of {queries} queries cannot be counts of tokens"
    return hits / queries, ""
