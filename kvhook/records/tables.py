"""The tables of one run: steps, finished requests, single latencies, and the facts about its engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvhook.errors import KvhookError
from kvhook.records.columns import Table, has, with_stats
from kvhook.records.engines import Engines
from kvhook.records.run import Run
from kvhook.records.sources import usable
from kvhook.ring.layout import FIELDS_AT, Layout, make_layout
from kvhook.ring.slots import fields_of, slot_head
from kvhook.schema import FINISH_REASONS, KINDS, VALUE_SERIES, VALUES, blank

if TYPE_CHECKING:
    from kvhook.ring.slots import Slots

#: A step does not bring more single latencies than this: a count beyond it is damaged.
MAX_LATENCIES = 1 << 31


class Records(Run):
    """One run as arrays. `kvhook.Trace` is this, with a summary and exports. See `Run` for its arguments."""

    def go_over(self, take: Callable[[Slots, Layout], None]) -> None:
        """One pass over the run: calls `take` with usable slots and their layout, in the order of the run.

        What is known of the engines is found on the way, if it has not been found before.
        """
        engines = Engines(self._after)
        for source in self.sources:
            engines.begin(source)
            for slots in source.chunks():
                take(engines.take(slots), source.layout)
        self._found(engines)

    def steps(self, engine: int | None = None, *, complete: bool = False) -> Table:
        """One row per engine step, in order. For states (usage, requests that run or wait) use ``complete=True``.

        >>> trace = kvhook.open("run.kvh")
        >>> steps = trace.steps(complete=True)
        >>> print(f"{steps['kv_cache_usage'].max():.1%} of the KV cache in use at most")
        90.9% of the KV cache in use at most

        In some steps vLLM's scheduler sends no stats. There a state is not known (-1 or NaN), and one NaN is enough to
        make the maximum of a column NaN. ``complete=True`` leaves these steps out. Sums of what was counted belong over
        all steps:

        >>> steps = trace.steps()
        >>> len(steps), int(steps["num_generation_tokens"].sum())
        (56, 168)
        >>> print(steps[["step", "num_running_reqs", "prefix_cache_hits", "num_generation_tokens"]][:3])
        [(0, 3, 128, 3) (1, 3,   0, 3) (2, 3,   0, 3)]

        Args:
            engine: only the steps of this engine.
            complete: only steps that brought the scheduler's stats, so that every state is known.

        Returns:
            A structured array with the columns of `kvhook.schema.STEP_FIELDS` that this vLLM fills, and ``engine``,
            the number of the engine in its process.
        """
        steps = self._gather("step", engine)
        return with_stats(steps) if complete else steps

    def requests(self, engine: int | None = None) -> Table:
        """One row per finished request, in the order of finishing: the columns of `kvhook.schema.REQUEST_FIELDS`
        that this vLLM fills, and ``engine``. ``finish_reason`` is text. At level light there are none.

        >>> requests = kvhook.open("run.kvh").requests()
        >>> print(requests[["request", "finish_reason", "num_prompt_tokens", "num_cached_tokens"]][:3])
        [(0, 'length', 72,  0) (1, 'length', 72, 64) (2, 'length', 72, 64)]

        Args:
            engine: only the requests of this engine.
        """
        return self._gather("request", engine)

    def latencies(
        self, series: str, engine: int | None = None
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        """Every single value of a series, as different values and how often each occurred.

        >>> values, counts = kvhook.open("run.kvh").latencies("time_to_first_token")
        >>> print(f"{counts.sum()} first tokens, the slowest after {1e3 * values.max():.0f} ms")
        12 first tokens, the slowest after 232 ms

        Args:
            series: ``"time_to_first_token"`` or ``"inter_token_latency"``.
            engine: only the values of this engine.

        Returns:
            Values in seconds, not sorted, and counts; ``np.repeat(values, counts)`` is the plain list.

        Raises:
            KvhookError: there is no such series.
        """
        if series not in VALUE_SERIES:
            raise KvhookError(f"there is no series {series!r}; there are {', '.join(VALUE_SERIES)}")
        prefix = ("ttft", "itl")[VALUE_SERIES.index(series)]
        steps = self.steps(engine)
        if not has(steps, f"{prefix}_count"):
            return np.empty(0), np.empty(0, np.int64)
        count, low, high = (steps[f"{prefix}_{what}"] for what in ("count", "min", "max"))
        count = np.where((count >= 0) & (count < MAX_LATENCIES), count, 0)
        # what the step records tell by themselves: equal values, and pairs; see the compiler
        equal, pair = (count > 0) & (low == high), (count == 2) & (low != high)
        values = [low[equal], low[pair], high[pair]]
        counts = [count[equal], np.ones(2 * pair.sum(), np.int64)]
        for slots, layout in self._slots(VALUES, engine):
            fields = fields_of(slots, layout.columns["values"])
            mine = fields["series"] == VALUE_SERIES.index(series)
            first = FIELDS_AT + 8 * len(layout.columns["values"])
            room = layout.values_per_slot
            lists = np.ascontiguousarray(slots[:, first : first + 8 * room]).view("<f8")
            inside = np.arange(room) < np.clip(fields["count"], 0, room)[:, None]
            single = lists[inside & mine[:, None]]
            values.append(single)
            counts.append(np.ones(len(single), np.int64))
        return np.concatenate(values), np.concatenate(counts)

    def chunks(self) -> Iterator[tuple[Slots, Layout]]:
        """All usable slots in the order of the run, some thousands at a time, with their layout."""
        for source in self.sources:
            for slots in source.chunks():
                yield slots[usable(slots)], source.layout

    def table(self, slots: Slots, layout: Layout, kind: str) -> Table:
        """Raw slots of one kind as the structured array that `steps` and `requests` give."""
        columns = self.columns(kind)
        types = [("engine", "<i8")] + [(c.name, "U12" if c.enum else c.type) for c in columns]
        out = np.empty(len(slots), types)
        out["engine"] = slot_head(slots)["engine"]
        stored = {c.name for c in layout.columns[kind]}
        fields = fields_of(slots, layout.columns[kind])
        blanks = {f.name: float(blank(f)) for f in KINDS[kind][1]}
        for c in columns:
            if c.name not in stored:
                out[c.name] = blanks.get(c.name, 0)
            else:
                out[c.name] = reason_texts(fields[c.name]) if c.enum else fields[c.name]
        return out

    def _gather(self, kind: str, engine: int | None) -> Table:
        parts = [self.table(slots, layout, kind) for slots, layout in self._slots(KINDS[kind][0], engine)]
        if not parts:
            layout = self.sources[0].layout if self.sources else make_layout({})
            return self.table(np.empty((0, layout.slot_bytes), np.uint8), layout, kind)
        return np.concatenate(parts)

    def _slots(self, kind: int, engine: int | None) -> Iterator[tuple[Slots, Layout]]:
        for slots, layout in self.chunks():
            head = slot_head(slots)
            mine = head["kind"] == kind
            if engine is not None:
                mine &= head["engine"] == engine
            if mine.any():
                yield slots[mine], layout


def reason_texts(codes: npt.NDArray[np.int64]) -> npt.NDArray[np.str_]:
    """Finish reasons as text; a code that is newer than this kvhook stays a number."""
    known = np.array(FINISH_REASONS)
    fits = (codes >= 0) & (codes < len(known))
    return np.where(fits, known[np.where(fits, codes, 0)], codes.astype("U12"))
