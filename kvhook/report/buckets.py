"""Steps reduced to some thousands of buckets as they come, each with mean, smallest and largest value of every column.

How many steps there will be need not be known: when the buckets are full, neighbours are merged two by two and hold
twice as many steps from then on. A value that only one step had is the smallest or largest of its bucket, whatever its
size, so that it cannot get lost. Memory does not grow with the run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

#: At the end of a long run there are between this many buckets and twice as many.
BUCKETS = 16_384


class Buckets:
    """Columns of steps, reduced.

    Args:
        columns: their names.
        fewest: half of the buckets that there can be.

    Attributes:
        size: steps in each bucket; the last one may have less.
        steps: steps so far.
    """

    def __init__(self, columns: Sequence[str], fewest: int = BUCKETS) -> None:
        self.size, self.steps = 1, 0
        self._room, self._used = 2 * fewest, 0
        self._columns = list(columns)
        count = len(self._columns)
        self._begin, self._end = np.empty(self._room), np.empty(self._room)
        self._sum, self._known = np.zeros((count, self._room)), np.zeros((count, self._room))
        self._low, self._high = np.full((count, self._room), np.nan), np.full((count, self._room), np.nan)
        self._rest: tuple[Floats, Floats, list[Floats]] | None = None

    def take(self, begin: Floats, end: Floats, values: Mapping[str, Floats]) -> None:
        """Take in steps in order.

        Args:
            begin: when each began.
            end: when each ended.
            values: for each column a value per step, NaN where it is not known. A column that is missing is not known.
        """
        nothing = np.full(len(begin), np.nan)
        columns = [values.get(name, nothing) for name in self._columns]
        self.steps += len(begin)
        if self._rest is not None:
            old_begin, old_end, old = self._rest
            begin, end = np.concatenate((old_begin, begin)), np.concatenate((old_end, end))
            columns = [np.concatenate(pair) for pair in zip(old, columns, strict=True)]
        at = 0
        while at + self.size <= len(begin):
            if self._used == self._room:
                self._halve()
                continue
            many = min((len(begin) - at) // self.size, self._room - self._used)
            self._add(many, slice(at, at + many * self.size), begin, end, columns)
            at += many * self.size
        self._rest = (begin[at:], end[at:], [column[at:] for column in columns]) if at < len(begin) else None

    def _add(self, many: int, rows: slice, begin: Floats, end: Floats, columns: list[Floats]) -> None:
        place = slice(self._used, self._used + many)
        self._begin[place] = begin[rows][:: self.size]
        self._end[place] = end[rows][self.size - 1 :: self.size]
        for i, column in enumerate(columns):
            _reduce(column[rows].reshape(many, -1), self._sum[i], self._known[i], self._low[i], self._high[i], place)
        self._used += many

    def _halve(self) -> None:
        half = self._used // 2
        self._begin[:half] = self._begin[: self._used : 2]
        self._end[:half] = self._end[1 : self._used : 2]
        for reduce, array in (
            (np.add, self._sum),
            (np.add, self._known),
            (np.fmin, self._low),
            (np.fmax, self._high),
        ):
            array[:, :half] = reduce(array[:, : self._used : 2], array[:, 1 : self._used : 2])
        self._used, self.size = half, self.size * 2

    def result(self) -> Reduced:
        """The buckets; nothing may be taken in after it."""
        if self._rest is not None:
            begin, end, columns = self._rest
            self._rest = None
            if self._used == self._room:  # the last one, which is not full, needs a place
                self._halve()
            place = slice(self._used, self._used + 1)
            self._begin[place], self._end[place] = begin[0], end[-1]
            for i, column in enumerate(columns):
                _reduce(column.reshape(1, -1), self._sum[i], self._known[i], self._low[i], self._high[i], place)
            self._used += 1
        used = self._used
        return Reduced(
            self.size,
            self.steps,
            self._begin[:used],
            self._end[:used],
            {name: self._sum[i, :used] for i, name in enumerate(self._columns)},
            {name: self._known[i, :used] for i, name in enumerate(self._columns)},
            {name: self._low[i, :used] for i, name in enumerate(self._columns)},
            {name: self._high[i, :used] for i, name in enumerate(self._columns)},
        )


def _reduce(block: Floats, total: Floats, known: Floats, low: Floats, high: Floats, place: slice) -> None:
    """A row of values for each bucket, of which NaN is left out."""
    nothing = np.isnan(block)
    if nothing.any():
        known[place] = block.shape[1] - nothing.sum(axis=1)
        total[place] = np.where(nothing, 0.0, block).sum(axis=1)
    else:
        known[place], total[place] = block.shape[1], block.sum(axis=1)
    low[place], high[place] = np.fmin.reduce(block, axis=1), np.fmax.reduce(block, axis=1)


@dataclasses.dataclass(frozen=True)
class Reduced:
    """What `Buckets` made of a run."""

    #: steps in each bucket but the last
    size: int
    #: all steps
    steps: int
    #: when the first step of each bucket began, and when its last one ended
    begin: Floats
    end: Floats
    #: column -> sum of the known values in each bucket
    total: dict[str, Floats]
    #: column -> how many are known
    known: dict[str, Floats]
    #: column -> the smallest of them, NaN without any; and the largest
    low: dict[str, Floats]
    high: dict[str, Floats]

    def mean(self, column: str) -> Floats:
        """The mean of the known values in each bucket, NaN without any."""
        return ratio(self.total[column], self.known[column])

    def is_known(self, column: str) -> bool:
        """Whether any step has a value of it."""
        return column in self.known and bool(self.known[column].any())


def ratio(part: Floats, whole: Floats) -> Floats:
    """A share, NaN of nothing."""
    out: Floats = np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)
    return out
