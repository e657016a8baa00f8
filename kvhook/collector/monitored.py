"""What was collected over time: the monitored times, the samples of polled sources, and what they come to."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from kvhook.analysis.history import History, Monitored, cut, even_edges, from_samples, monitored
from kvhook.collector import names
from kvhook.collector.reading import Reading

#: Points of the progressions in `VLLMMetricsCollector.get_comprehensive_stats`.
TREND_PARTS = 50

_EVER, _STILL = -math.inf, math.inf


class MonitoredTimes:
    """The monitored times of a collector, one after the other, and the samples that were taken. Not locked."""

    def __init__(self) -> None:
        self._unix_offset = time.time() - time.monotonic()
        self._samples: list[tuple[float, dict[str, float]]] = []
        self._sampled_source = names.UNAVAILABLE
        self._asked: list[float] = []  # times at which somebody collected
        self._periods: list[list[float]] = []  # begin and end of each, monotonic

    # ---- taking in -------------------------------------------------------------------------------------------------

    @property
    def going_on(self) -> bool:
        """Whether a monitored time is going on."""
        return bool(self._periods) and self._periods[-1][1] == _STILL

    @property
    def samples(self) -> int:
        """Samples that were taken."""
        return len(self._samples)

    def begin(self, t: float) -> None:
        """Begin a monitored time."""
        self._periods.append([t, _STILL])

    def end(self, t: float) -> None:
        """End the one that is going on."""
        self._periods[-1][1] = t

    def asked(self, t: float) -> None:
        """Somebody collected at this moment."""
        self._asked.append(t)

    def keep(self, reading: Reading | None) -> None:
        """Keep a sample, if it is of a source that must be polled."""
        if reading is not None and reading.past is None:
            self._samples.append((reading.t, dict(reading.values)))
            self._sampled_source = reading.source

    # ---- asking ----------------------------------------------------------------------------------------------------

    def rows(self, reading: Reading | None) -> tuple[str, History]:
        """Everything there is, also from outside the monitored times, and the source it is from."""
        if reading is not None and reading.rows is not None:
            rows = reading.rows
            rows["timestamp"] = rows["t"] + self._unix_offset
            return reading.source, rows
        return self._sampled_source, from_samples(self._samples, self._unix_offset)

    def mask(self, rows: History) -> npt.NDArray[np.bool_]:
        """Which rows are of a monitored time; all of them if there never was one."""
        t = rows["t"]
        mask: npt.NDArray[np.bool_] = t != t if self._periods else t == t
        for begin, end in self._periods:
            mask |= (t >= begin) & (t <= end)
        return mask

    def parts(self, rows: History) -> list[Monitored]:
        """The monitored times that have rows, with the hit rate at each row."""
        return [part for part in monitored(rows, self._periods or [(_EVER, _STILL)]) if len(part.rows)]

    def summary(self, rows: History, how: str) -> dict[str, Any]:
        """The last monitored time in numbers.

        Args:
            rows: all rows.
            how: how they were collected, in words.
        """
        begin, end = self._last
        return {
            "of": how if len(rows) else "nothing",
            "monitored_seconds": None if begin == _EVER else min(end, time.monotonic()) - begin,
            **cut(rows, (begin, end))[0],
        }

    def trend(self, rows: History) -> dict[str, Any]:
        """How usage and hit rate went over the last monitored time, and between two collections."""
        begin, end = self._last
        parts = cut(rows, even_edges(rows, begin, end, TREND_PARTS))
        asked = [begin, *(t for t in self._asked if begin < t <= end)]
        usage = ("end", "kv_cache_usage", "kv_cache_usage_peak", "num_running_reqs_peak", "num_waiting_reqs_peak")
        rates = ("end", "prefix_cache_queries", "prefix_cache_hits", "prefix_cache_hit_rate")
        return {
            "usage_progression": [{name: part[name] for name in usage} for part in parts],
            "hit_rate_progression": [
                {name: part[name] for name in (*rates, "prefix_cache_hit_rate_so_far")} for part in parts
            ],
            "between_collections": cut(rows, asked),
        }

    @property
    def _last(self) -> tuple[float, float]:
        begin, end = self._periods[-1] if self._periods else (_EVER, _STILL)
        return begin, end
