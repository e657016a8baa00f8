"""Values that come bit by bit, and exact quantiles of them at any time.

There are two ways to keep them. For a file that is read once, they are kept as they come, and a question goes over them
with `kvhook.analysis.select`. For a run that goes on and may be asked at any time, they are kept in *runs*: sorted,
different values with the number of values up to each. A question looks into the runs by bisection, so that it takes
about as long after ten million values as after a thousand. New values wait until there are enough for a run, and small
runs are merged into larger ones.

Runs that have reached their full size are kept in files without a name, so that memory stays flat.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvhook.analysis.distribution import NOTHING, Distribution
from kvhook.analysis.exact import ExactSum
from kvhook.analysis.select import Part, select
from kvhook.ring.place import history_root

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[Any]

#: Values that wait before they become a run.
PENDING = 4096
#: So many runs of at most this size are merged into one. A larger one than the last of these is left as it is, on disk.
MERGED = ((1 << 15, 16), (1 << 19, 16))
#: Values that are kept as they come are joined to pieces of this size.
_PIECE = 1 << 18
#: One of so many values of a run is looked at to find where a quantile is.
_EVERY = 512


class Run(NamedTuple):
    """Different values in ascending order; how many values there are before the first, up to it, up to the second and
    so on; every so-manieth of the values, the last among them; and how many values there are from each of these marks,
    which does not count itself, to the next."""

    values: Floats
    up_to: Ints
    marks: Floats
    weights: Ints


class Values:
    """Values and how often each occurred. NaN is left out, as are values that occurred no times.

    Args:
        runs: keep them in runs, to be asked at any time; else as they come.
        add_up: their sum is wanted.
    """

    __slots__ = ("_add_up", "_index", "_keep_runs", "_pending", "_runs", "_size", "_sum", "_whole", "count", "largest")

    def __init__(self, *, runs: bool = False, add_up: bool = True) -> None:
        self._add_up = add_up
        self._keep_runs = runs
        self._pending: list[Part] = []
        self._size = self._whole = 0  # of the parts, the first so many have been joined
        self._runs: list[Run] = []
        self._index: tuple[Floats, Ints, int] | None = None
        self._sum = ExactSum()
        #: how many values there are
        self.count = 0
        self.largest = -math.inf

    # ---- taking in -------------------------------------------------------------------------------------------------

    def take(self, values: Floats, counts: Ints | None = None) -> None:
        """Take values in, each of which occurred `counts` times (once, if not given). The arrays are kept."""
        if not len(values):
            return
        keep = values == values
        if counts is not None:
            keep &= counts > 0
        if not keep.all():
            values, counts = values[keep], None if counts is None else counts[keep]
            if not len(values):
                return
        if counts is not None and counts.max() < 1 << 31:
            counts = counts.astype(np.int32)
        self.count += len(values) if counts is None else int(counts.sum())
        if self._add_up:
            self._sum.take(values, counts)
        self.largest = max(self.largest, float(values.max()))
        self._pending.append((values, counts))
        self._size += len(values)
        if self._keep_runs and self._size >= PENDING:
            self._settle()
        elif self._size >= _PIECE:
            fresh = self._pending[self._whole :]
            plain, weighted = [p for p in fresh if p[1] is None], [p for p in fresh if p[1] is not None]
            self._pending[self._whole :] = [_joined(some) for some in (plain, weighted) if some]
            self._whole, self._size = len(self._pending), 0

    def add(self, other: Values) -> None:
        """Add what another one holds, which stays as it is."""
        self.count += other.count
        self._sum.add(other._sum)
        self.largest = max(self.largest, other.largest)
        self._pending += other._pending
        self._size += other._size
        self._runs += other._runs
        self._index = other._index if len(self._runs) == len(other._runs) else None

    def _settle(self) -> None:
        """Make a run of what waits, and merge runs of one size while there are many."""
        if self._pending:
            self._runs.append(_run_of(self._pending))
        self._pending, self._size, self._index = [], 0, None
        for size, many in MERGED:
            small = [run for run in self._runs if len(run.values) <= size]
            if len(small) >= many:
                merged = _merged(small)
                if len(merged.values) > MERGED[-1][0]:
                    merged = _in_a_file(merged)
                self._runs = [run for run in self._runs if len(run.values) > size] + [merged]

    # ---- asking ----------------------------------------------------------------------------------------------------

    @property
    def sum(self) -> float:
        """The sum of all values, if it was wanted."""
        return self._sum.value

    @property
    def mean(self) -> float:
        """Their mean, NaN without values."""
        return self.sum / self.count if self.count else math.nan

    def at(self, ranks: list[int]) -> dict[int, float]:
        """The values that stand at these places, from 0, if all are sorted; there must be so many.

        The marks of all runs say between which two values a place is, give or take what lies between two marks of each
        run. What the runs hold between these two values is looked at.
        """
        if not self._runs:
            return select(self._pending, ranks)
        marks, up_to, slack = self._marks()
        slack += sum(len(v) if c is None else int(c.sum()) for v, c in self._pending)
        begins = up_to.searchsorted([rank - slack for rank in ranks], side="right").tolist()
        ends = up_to.searchsorted(ranks, side="right").tolist()
        wanted: dict[tuple[int, int], list[int]] = defaultdict(list)
        for rank, begin, end in zip(ranks, begins, ends, strict=True):
            wanted[begin, end].append(rank)
        found: dict[int, float] = {}
        for (begin, end), inside in wanted.items():
            low = marks[begin - 1] if begin else -math.inf
            parts, before = self._between(low, marks[end] if end < len(marks) else math.inf)
            some = select([_joined(parts)], [rank - before for rank in inside])
            found |= {rank: some[rank - before] for rank in inside}
        return found

    def _marks(self) -> tuple[Floats, Ints, int]:
        """The marks of all runs, sorted; at least how many values there are up to each; and how many more at most."""
        if self._index is None:
            marks = np.concatenate([run.marks for run in self._runs])
            weights = np.concatenate([run.weights for run in self._runs])
            order = np.argsort(marks, kind="stable")
            slack = sum(int(run.weights.max()) for run in self._runs)
            self._index = marks[order], np.cumsum(weights[order]), slack
        return self._index

    def _between(self, low: float, high: float) -> tuple[list[Part], int]:
        """What is above one value and not above another, and how many values are not above the first."""
        parts: list[Part] = []
        before = 0
        for run in self._runs:
            begin, end = run.values.searchsorted([low, high], side="right").tolist()
            before += int(run.up_to[begin])
            if end > begin:
                parts.append((run.values[begin:end], np.diff(run.up_to[begin : end + 1])))
        for values, counts in self._pending:
            below, inside = values <= low, (values > low) & (values <= high)
            before += int(below.sum() if counts is None else counts[below].sum())
            parts.append((values[inside], None if counts is None else counts[inside]))
        return parts, before

    def quantiles(self, at: tuple[float, ...], shift: float = 0.0) -> list[tuple[float, float, float]]:
        """For each fraction from 0 to 1 the two neighbours between which the quantile lies, and how far it is from
        the first to the second (Hyndman and Fan 1996, definition 7); there must be values.

        Args:
            at: the fractions.
            shift: is added to the values.
        """
        places = [fraction * (self.count - 1) for fraction in at]
        ranks = sorted({r for p in places for r in (math.floor(p), math.ceil(p))})
        values = self.at(ranks)
        return [(values[math.floor(p)] + shift, values[math.ceil(p)] + shift, p - math.floor(p)) for p in places]

    def up_to(self, bounds: Floats) -> list[int]:
        """How many values there are up to each bound."""
        total = np.zeros(len(bounds), np.int64)
        for run in self._runs:
            total += run.up_to[run.values.searchsorted(bounds, side="right")]
        ordered = np.sort(bounds)
        among = np.cumsum(sum((_between_bounds(part, ordered) for part in self._pending), np.zeros(len(bounds) + 1)))
        total += among.astype(np.int64)[ordered.searchsorted(bounds)]
        counts: list[int] = total.tolist()
        return counts

    def describe(self) -> Distribution:
        """Count, mean, quantiles and largest, as `kvhook.analysis.distribution.distribution` gives them."""
        if not self.count:
            return NOTHING
        p50, p90, p99 = (low + (high - low) * part for low, high, part in self.quantiles((0.5, 0.9, 0.99)))
        return Distribution(self.count, self.mean, p50, p90, p99, self.largest)

    def nth(self, fraction: float, shift: float = 0.0) -> float | None:
        """A single quantile, rounded as ``np.quantile`` does; None without values."""
        if not self.count:
            return None
        ((low, high, part),) = self.quantiles((fraction,), shift)
        return high - (high - low) * (1 - part) if part >= 0.5 else low + (high - low) * part

    def median(self, shift: float = 0.0) -> float | None:
        """The median, rounded as ``np.median`` does; None without values."""
        if not self.count:
            return None
        ((low, high, part),) = self.quantiles((0.5,), shift)
        return (low + high) / 2 if part else low


def _joined(parts: list[Part]) -> Part:
    """Several parts as one."""
    values = np.concatenate([v for v, _ in parts])
    if all(counts is None for _, counts in parts):
        return values, None
    return values, np.concatenate([np.ones(len(v), np.int64) if c is None else c for v, c in parts])


def _run_of(parts: list[Part]) -> Run:
    values, counts = _joined(parts)
    if counts is None:
        values.sort()
        return _distinct(values, np.arange(1, len(values) + 1))
    order = np.argsort(values)
    return _distinct(values[order], np.cumsum(counts[order]))


def _merged(runs: list[Run]) -> Run:
    values = np.concatenate([run.values for run in runs])
    counts = np.concatenate([np.diff(run.up_to) for run in runs])
    order = np.argsort(values, kind="stable")  # what is sorted in parts is merged
    return _distinct(values[order], np.cumsum(counts[order]))


def _in_a_file(run: Run) -> Run:
    """The same run, on disk; the file goes with it. Where it cannot be written, the run stays in memory."""
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=history_root()) as file:
        run.values.tofile(file)
        run.up_to.tofile(file)
        file.flush()
        count = len(run.values)
        # as plain arrays: those of a class of their own are slow to look into
        values = np.asarray(np.memmap(file, np.float64, "r", shape=(count,)))
        return Run(values, np.asarray(np.memmap(file, np.int64, "r", 8 * count, (count + 1,))), *run[2:])
    return run


def _distinct(values: Floats, up_to: Ints) -> Run:
    """Sorted values without repetition."""
    last = np.append(values[1:] != values[:-1], True)
    if not last.all():
        values, up_to = values[last], up_to[last]
    marks = np.append(np.arange(0, len(values) - 1, _EVERY), len(values) - 1)
    return Run(values, np.concatenate(([0], up_to)), values[marks], np.diff(up_to[marks], prepend=0))


def _between_bounds(part: Part, bounds: Floats) -> Floats:
    """How many values there are up to the first bound, from there up to the second and so on, and above the last. Some
    are looked at at a time, so that this takes no memory that grows with them."""
    values, counts = part
    found = np.zeros(len(bounds) + 1)
    for at in range(0, len(values), _PIECE):
        some = slice(at, at + _PIECE)
        weights = None if counts is None else counts[some]
        found += np.bincount(bounds.searchsorted(values[some]), weights, len(found))
    return found
