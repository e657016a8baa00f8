"""The two clocks of a run: the monotonic one that is recorded, and the time since 1970 that other tools' logs have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
#: So many readings of the clocks are kept of a run: one for each ten seconds of half a day.
MOST_READINGS = 4096
#: No clock shows more nanoseconds than this, some 146 years: a damaged file does.
_MOST_NS = 1 << 62


def readings_in(raw: Any) -> dict[int, int]:
    """Readings as `Clock.readings` gives them, out of a file; what is none is left out."""
    pairs = raw if isinstance(raw, list) else []
    return {
        pair[0]: pair[1] for pair in pairs if isinstance(pair, list) and len(pair) == 2 and all(map(_is_shown, pair))
    }


def _is_shown(ns: Any) -> bool:
    """Whether a clock can show this."""
    return type(ns) is int and 0 <= ns < _MOST_NS


class Clock:
    """Turns monotonic nanoseconds into nanoseconds since 1970.

    Args:
        readings: monotonic -> realtime, both read at the same moment: one when the recording began, and more while it
            went on. Between two readings the difference of the clocks is taken to change evenly; before the first and
            after the last it is that of the nearest. What no clock can show is left out.
    """

    def __init__(self, readings: Mapping[int, int]) -> None:
        at = sorted(one for one, real in readings.items() if _is_shown(one) and _is_shown(real))
        if len(at) > MOST_READINGS:
            # evenly, first and last among them; to thin out once more changes nothing
            at = [at[i * (len(at) - 1) // (MOST_READINGS - 1)] for i in range(MOST_READINGS)]
        self._at = np.array(at, np.int64)
        self._offsets: Ints = np.array([readings[one] - one for one in at], np.int64)

    @property
    def readings(self) -> list[list[int]]:
        """Both clocks at the moments that are known: pairs of monotonic and realtime nanoseconds."""
        return [list(pair) for pair in zip(self._at.tolist(), (self._at + self._offsets).tolist(), strict=True)]

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
