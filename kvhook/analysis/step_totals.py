"""What a summary needs of an engine's steps, added up as they come."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt

from kvhook.analysis.queue import Queues, QueueSteps
from kvhook.analysis.raw import Rows
from kvhook.analysis.values import Values
from kvhook.records.tables import MAX_LATENCIES
from kvhook.schema import LEVELS

_FULL, _SPARSE = LEVELS.index("full"), LEVELS.index("sparse")
_FAR = 1 << 62

#: From this usage on the cache counts as full, and below this one as having room.
FULL, WITH_ROOM = 0.9, 0.7

#: States of which the largest is wanted, in steps that brought the scheduler's stats.
_PEAKS = ("num_running_reqs", "num_waiting_reqs")


class StepTotals:
    """An engine's steps in numbers. Engines, and parts of a run, are put together with `add`.

    Args:
        runs: it will be asked now and then while it grows, see `Values`.

    Attributes:
        steps: how many.
        known: those that brought the scheduler's stats. Only in these are states known.
        levels: how many of each level.
        sums: column -> its sum, of every column of whole numbers.
        timed: steps that have a start and an end; `nanoseconds` is what they took together.
        known_sums, known_peaks: of the states that are whole numbers.
        usage, cost, made, seconds: values of ``kv_cache_usage``, ``kvhook_ns``, ``vllm_stats_ns`` and step times.
        hits: tokens found in a step -> steps; without 0.
    """

    def __init__(self, *, runs: bool = False) -> None:
        self.steps = self.known = self.timed = self.nanoseconds = 0
        self.levels: Counter[int] = Counter()
        self.sums: Counter[str] = Counter()
        self.known_sums: Counter[str] = Counter()
        self.known_peaks: dict[str, int] = {}
        self.first: tuple[int, int] | None = None  # where the first step is in the run, and its number
        self.last_known: tuple[int, dict[str, int]] | None = None  # the same of the last one with stats, and its states
        self._spans: list[tuple[int, int] | None] = [None, None]
        # usage
        self.usage, self.usage_unknown = Values(runs=runs), 0
        self.usage_peak_in_step: float | None = None
        self.blocks_used = self.usage_above_0 = self.ran = self.waited = False
        self.impossible_blocks = self.blocks_above_peak = 0
        # why requests waited, for a diagnosis without the engine core's account
        self.full_and_waiting = 0
        #: requests in the batch -> steps in which others waited although the cache had room
        self.waiting_with_room: Counter[int] = Counter()
        #: inter-token latencies in steps with first tokens, and in the others: how many, and their sum
        self.itl_beside_prefill, self.itl_alone = [0, 0.0], [0, 0.0]
        # look-ups
        self.hits: Counter[int] = Counter()
        self.logged_known = self.missed_steps = self.missed_queries = self.missed_hits = 0
        # times
        self.seconds = Values(runs=runs, add_up=False)
        self.cost, self.made = (Values(runs=runs) for _ in range(2))
        self.latencies = {prefix: Values(runs=runs) for prefix in ("ttft", "itl")}
        self.queues = Queues()
        #: state -> when it was known last (the end of a step, in ns), and what it was
        self.latest: dict[str, tuple[int, float]] = {}
        #: the last step, and where it is in the run
        self.last: tuple[int, Rows] | None = None
        #: steps in which the columns of `COUNTED` are not known
        self.uncounted = 0

    # ---- taking in -------------------------------------------------------------------------------------------------

    def take(self, rows: Rows, place: int) -> None:
        """Take in steps.

        Args:
            rows: the steps; at least one.
            place: where they are in the run; what comes later has a higher number.
        """
        if self.first is None:
            self.first = (place, int(rows.ints("step")[0]))
        self.steps += len(rows)
        self.last = place, rows.last()
        self.sums.update(rows.sums())
        known = rows.ints("has_scheduler_stats") == 1
        level = rows.ints("level")
        for code in range(len(LEVELS)):
            if count := int(np.count_nonzero(level == code)):
                self.levels[code] += count
        if self.levels[_SPARSE]:
            self.uncounted += int(np.count_nonzero((level == _SPARSE) & (rows.ints("has_iteration_stats") == 0)))
        self._take_times(rows)
        self._take_states(rows, known, place)
        self._take_lookups(rows, known & (level == _FULL))
        for prefix, values in self.latencies.items():
            _take_latencies(rows, prefix, values)
        self._take_prefill(rows)
        for name, values in (("kvhook_ns", self.cost), ("vllm_stats_ns", self.made)):
            measured = rows.ints(name)
            values.take(measured[measured >= 0].astype(np.float64))
        self.queues.take_steps(
            QueueSteps(
                rows.ints("step"),
                known,
                rows.ints("num_running_reqs") + rows.ints("num_waiting_reqs"),
                rows.ints("num_added_reqs"),
                rows.ints("num_finished_reqs"),
                rows.ints("num_aborted_reqs"),
                level > 0,
            )
        )

    def _take_times(self, rows: Rows) -> None:
        start, end = rows.ints("t_start_ns"), rows.ints("t_end_ns")
        took = end - start
        timed = took != 0
        self._widen(1, start, end)
        if not timed.all():
            start, end, took = start[timed], end[timed], took[timed]
        if len(took):
            self._widen(0, start, end)
            self.timed += len(took)
            self.nanoseconds += int(took.sum())
            self.seconds.take(took / 1e9)

    def _widen(self, which: int, start: npt.NDArray[np.int64], end: npt.NDArray[np.int64]) -> None:
        self._spans[which] = _both(self._spans[which], (int(start.min()), int(end.max())))

    def _take_states(self, rows: Rows, known: npt.NDArray[np.bool_], place: int) -> None:
        count = int(np.count_nonzero(known))
        self.known += count
        if not count:
            return
        of: slice | npt.NDArray[np.bool_] = slice(None) if count == len(rows) else known
        states = {name: rows.ints(name)[of] for name in _PEAKS}
        for name, values in states.items():
            self.known_sums[name] += int(values.sum())
            self.known_peaks[name] = max(self.known_peaks.get(name, int(values[0])), int(values.max()))
        self.last_known = place, {name: int(values[-1]) for name, values in states.items()}
        self.ran |= bool(states["num_running_reqs"].any())
        self.waited |= bool((states["num_waiting_reqs"] > 0).any())
        usage, inside = rows.floats("kv_cache_usage")[of], rows.floats("kv_cache_usage_peak")[of]
        self._take_latest(rows.ints("t_end_ns")[of], {**states, "kv_cache_usage": usage, **_v0(rows, of)})
        self._take_waiting(states["num_running_reqs"], states["num_waiting_reqs"], usage)
        self.usage_unknown += int(np.count_nonzero(np.isnan(usage)))
        different, counts = np.unique(usage, return_counts=True)
        self.usage.take(different, counts)
        self.usage_above_0 |= bool(usage.any())
        inside = inside[~np.isnan(inside)]
        if len(inside):
            peak = float(inside.max())
            self.usage_peak_in_step = peak if self.usage_peak_in_step is None else max(self.usage_peak_in_step, peak)
        blocks, used, most = (rows.ints(f"num_kv_blocks{end}")[of] for end in ("", "_used", "_peak"))
        self.blocks_used |= bool(used.any())
        above = (most >= 0) & (used > most)
        impossible = (blocks >= 0) & ((used > blocks) | (most > blocks))
        self.impossible_blocks += int(np.count_nonzero(impossible | above))
        self.blocks_above_peak += int(np.count_nonzero(above))

    def _take_waiting(self, running: npt.NDArray[Any], waiting: npt.NDArray[Any], usage: npt.NDArray[Any]) -> None:
        waits = waiting > 0
        if not waits.any():
            return
        self.full_and_waiting += int(np.count_nonzero(waits & (usage >= FULL)))
        seats, counts = np.unique(running[waits & (usage < WITH_ROOM)], return_counts=True)
        self.waiting_with_room.update(dict(zip(seats.tolist(), counts.tolist(), strict=True)))

    def _take_prefill(self, rows: Rows) -> None:
        count, first = rows.ints("itl_count"), rows.ints("ttft_count")
        there = ((count > 0) & (count < MAX_LATENCIES)).nonzero()[0]
        if not len(there):
            return
        took, beside = rows.floats("itl_sum", there), first[there] > 0
        for mine, sums in ((beside, self.itl_beside_prefill), (~beside, self.itl_alone)):
            sums[0] += int(count[there][mine].sum())
            sums[1] += float(took[mine].sum())

    def _take_latest(self, ends: npt.NDArray[np.int64], states: dict[str, npt.NDArray[Any]]) -> None:
        for name, values in states.items():
            if values.dtype == np.float64 and np.isnan(values).any():
                there = ~np.isnan(values)
                self._take_latest(ends[there], {name: values[there]})
            elif len(values):
                last = len(ends) - 1 - int(np.argmax(ends[::-1]))
                if int(ends[last]) >= self.latest.get(name, (-_FAR, 0.0))[0]:
                    self.latest[name] = int(ends[last]), float(values[last])

    def _take_lookups(self, rows: Rows, countable: npt.NDArray[np.bool_]) -> None:
        hits = rows.ints("prefix_cache_hits")
        found = hits[hits != 0]
        if len(found):
            different, counts = np.unique(found, return_counts=True)
            self.hits.update(dict(zip(different.tolist(), counts.tolist(), strict=True)))
        self.logged_known += int(np.count_nonzero(countable))
        queries = rows.ints("prefix_cache_queries")
        missed = countable & (rows.ints("scheduler_stats_logged") == 0) & (queries > 0)
        if missed.any():
            self.missed_steps += int(np.count_nonzero(missed))
            self.missed_queries += int(queries[missed].sum())
            self.missed_hits += int(hits[missed].sum())

    def add(self, later: StepTotals, place: int = 0) -> None:
        """Put those of another engine, or of a later part of the run, to these; they stay as they are.

        The queue is only right for parts of one engine.

        Args:
            later: what is added.
            place: what is added to its places in the run.
        """
        for name in _ADDED:
            setattr(self, name, getattr(self, name) + getattr(later, name))
        for name in ("blocks_used", "usage_above_0", "ran", "waited"):
            setattr(self, name, getattr(self, name) or getattr(later, name))
        for name in _COUNTERS:
            getattr(self, name).update(getattr(later, name))
        for name in ("itl_beside_prefill", "itl_alone"):
            setattr(self, name, [a + b for a, b in zip(getattr(self, name), getattr(later, name), strict=True)])
        for name in ("usage", "seconds", "cost", "made"):
            getattr(self, name).add(getattr(later, name))
        for prefix, values in self.latencies.items():
            values.add(later.latencies[prefix])
        for name, peak in later.known_peaks.items():
            self.known_peaks[name] = max(self.known_peaks.get(name, peak), peak)
        peaks = [p for p in (self.usage_peak_in_step, later.usage_peak_in_step) if p is not None]
        self.usage_peak_in_step = max(peaks, default=None)
        self._spans = [_both(a, b) for a, b in zip(self._spans, later._spans, strict=True)]
        first = None if later.first is None else (later.first[0] + place, later.first[1])
        self.first = min((f for f in (self.first, first) if f is not None), default=None)
        last = [self.last_known] if self.last_known is not None else []
        if later.last_known is not None:
            last.append((later.last_known[0] + place, later.last_known[1]))
        self.last_known = max(last, key=lambda one: one[0], default=None)
        if later.last is not None and (self.last is None or later.last[0] + place > self.last[0]):
            self.last = later.last[0] + place, later.last[1]
        for name, (end, value) in later.latest.items():
            if end >= self.latest.get(name, (-_FAR, 0.0))[0]:
                self.latest[name] = end, value
        self.queues.add(later.queues)

    # ---- asking ----------------------------------------------------------------------------------------------------

    @property
    def span(self) -> tuple[int, int]:
        """When the first step began and the last one ended, in nanoseconds; 0 and 0 without steps.

        A record without times may have been written long after the last step, for a request that was aborted.
        """
        return self._spans[0] or self._spans[1] or (0, 0)

    @property
    def by_level(self) -> dict[str, int]:
        """Level -> steps that were recorded at it, without levels that do not occur."""
        return {name: self.levels[code] for code, name in enumerate(LEVELS) if self.levels[code]}

    @property
    def full(self) -> int:
        """Steps at level full."""
        return self.levels[_FULL]


_ADDED = (
    *("steps", "known", "timed", "nanoseconds", "uncounted", "usage_unknown", "impossible_blocks", "blocks_above_peak"),
    *("logged_known", "missed_steps", "missed_queries", "missed_hits", "full_and_waiting"),
)
_COUNTERS = ("levels", "sums", "known_sums", "hits", "waiting_with_room")


def _v0(rows: Rows, of: slice | npt.NDArray[np.bool_]) -> dict[str, npt.NDArray[np.float64]]:
    name = "v0_prefix_cache_hit_rate"
    return {name: rows.floats(name)[of]} if rows.has(name) else {}


def _both(a: tuple[int, int] | None, b: tuple[int, int] | None) -> tuple[int, int] | None:
    if a is None or b is None:
        return a or b
    return min(a[0], b[0]), max(a[1], b[1])


def _take_latencies(rows: Rows, prefix: str, values: Values) -> None:
    """What the step records tell of single latencies by themselves: equal values, and pairs; see the compiler."""
    count = rows.ints(f"{prefix}_count")
    at = ((count > 0) & (count < MAX_LATENCIES)).nonzero()[0]
    if not len(at):
        return
    count, low, high = count[at], rows.floats(f"{prefix}_min", at), rows.floats(f"{prefix}_max", at)
    equal = low == high
    if equal.all():
        values.take(low, count)
        return
    values.take(low[equal], count[equal])
    pair = (count == 2) & ~equal
    if pair.any():
        values.take(low[pair])
        values.take(high[pair])
