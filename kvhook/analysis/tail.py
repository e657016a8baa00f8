"""The last steps of a stream that goes on, kept so that looking at them costs the same however many there are."""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt

from kvhook.records.columns import Table, has, total

#: Rows of the buffer at first; it doubles.
_ROOM = 256


class Tail:
    """The last steps of a stream, and sums over all that came.

    Rows are appended to one array, and what is asked for are views of it.

    Args:
        sums: columns that are added up.
        longest_ns: how long a step is kept, at least.
        most: how many steps are kept, at most.
    """

    def __init__(self, sums: tuple[str, ...], longest_ns: int, most: int) -> None:
        self._sums, self._longest_ns, self._most = sums, longest_ns, most
        self._rows: Table | None = None
        #: for each row: the latest end of a step so far, which never goes back as clocks of several threads may
        self._ends: npt.NDArray[np.int64] = np.empty(0, np.int64)
        self._begin = self._end = 0
        #: every step that ended after this moment and came is here, or is older than `longest_ns`
        self.whole_from_ns = 0
        self.totals: Counter[str] = Counter()
        self.known: set[str] = set()

    def __len__(self) -> int:
        return self._end - self._begin

    def take(self, steps: Table) -> None:
        """Take in steps that have come."""
        if not len(steps):
            return
        for name in self._sums:
            if (more := total(steps, name)) is not None:
                self.totals[name] += more
                self.known.add(name)
        if not len(self):
            self.whole_from_ns = int(steps["t_start_ns" if has(steps, "t_start_ns") else "t_end_ns"][0])
        if len(steps) > self._most:
            self.whole_from_ns = int(steps["t_end_ns"][-self._most - 1])
            steps = steps[-self._most :]
        rows = self._make_room(steps)
        last = int(self._ends[self._end - 1]) if len(self) else 0
        here = slice(self._end, self._end + len(steps))
        rows[here] = steps
        self._ends[here] = np.maximum(np.maximum.accumulate(steps["t_end_ns"]), last)
        self._end += len(steps)
        self._forget()

    def restart(self) -> None:
        """Forget all steps and their sums."""
        self._begin = self._end
        self.whole_from_ns = 0
        self.totals.clear()

    def since(self, begin_ns: int) -> Table | None:
        """The steps that ended after that moment; None before the first step."""
        if self._rows is None:
            return None
        first = np.searchsorted(self._ends[self._begin : self._end], begin_ns, side="right")
        return self._rows[self._begin + int(first) : self._end]

    def newest(self, count: int) -> Table | None:
        """At most so many steps, the last ones; None before the first step."""
        return None if self._rows is None else self._rows[max(self._begin, self._end - count) : self._end]

    def run(self, name: str) -> int | None:
        """The sum of a column over all steps; None if it is not known."""
        return self.totals[name] if name in self.known else None

    def _make_room(self, steps: Table) -> Table:
        """The array, with room for these rows at its end."""
        if self._rows is not None and self._end + len(steps) <= len(self._rows):
            return self._rows
        kept = len(self)
        room = max(_ROOM, 2 * (kept + len(steps)))
        rows, ends = np.empty(room, steps.dtype), np.empty(room, np.int64)
        if self._rows is not None:
            rows[:kept] = self._rows[self._begin : self._end]
            ends[:kept] = self._ends[self._begin : self._end]
        self._rows, self._ends, self._begin, self._end = rows, ends, 0, kept
        return rows

    def _forget(self) -> None:
        """Leave out what is too old; its rows are used again when the array is full."""
        ends = self._ends[self._begin : self._end]
        old = int(np.searchsorted(ends, ends[-1] - self._longest_ns, side="right"))
        many = len(self) - self._most
        if many > old:
            self.whole_from_ns = int(ends[many - 1])
        self._begin += max(old, many)
