"""The two clocks of a run: the monotonic one that is recorded, and the time since 1970 that other tools' logs have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


class Clock:
    """Turns monotonic nanoseconds into nanoseconds since 1970.

    Args:
        readings: monotonic -> realtime, both read at the same moment: one when the recording began, and more while it
            went on. Between two readings the difference of the clocks is taken to change evenly; before the first and
            after the last it is that of the nearest.
    """

    def __init__(self, readings: Mapping[int, int]) -> None:
        self._at = np.array(sorted(readings), np.int64)
        self._offsets: Ints = np.array([readings[int(at)] - int(at) for at in self._at], np.int64)

    @property
    def is_known(self) -> bool:
        """Whether there is a reading at all."""
        return bool(len(self._at))

    @property
    def drift_ns(self) -> int:
        """How much further the time since 1970 went from the first reading to the last than the monotonic clock:
        what adjustments of the machine's clock (NTP, by hand) came to."""
        return int(self._offsets[-1] - self._offsets[0]) if self.is_known else 0

    def unix(self, monotonic: Any) -> Ints:
        """Nanoseconds since 1970. What is not known (negative, or no clock was read) is -1."""
        at: Ints = np.asarray(monotonic, np.int64)
        if not self.is_known:
            return np.full(at.shape, -1, np.int64)
        # what is interpolated is small: in floats a difference of clocks of 50 years would lose 200 ns
        first, begin = self._offsets[0], self._at[0]
        change = np.interp((at - begin).astype(np.float64), self._at - begin, self._offsets - first)
        return np.where(at < 0, np.int64(-1), at + first + np.rint(change).astype(np.int64))
