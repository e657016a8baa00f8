"""The tables of one run: steps, finished requests, single latencies, and the facts about its engines."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvhook.errors import KvhookError
from kvhook.records.columns import Table, has
from kvhook.records.engines import Engines
from kvhook.records.run import Run
from kvhook.records.sources import usable
from kvhook.ring.layout import FIELDS_AT, Layout
from kvhook.ring.slots import fields_of, slot_head
from kvhook.schema import FINISH_REASONS, KINDS, NAMES, VALUE_SERIES, VALUES, blank, unix_columns

if TYPE_CHECKING:
    from kvhook.ring.slots import Slots

#: Kind of record -> column of nanoseconds since 1970 -> the column of the monotonic clock that it is made of.
_UNIX = {kind: unix_columns(fields) for kind, (_, fields) in KINDS.items()}

#: A step does not bring more single latencies than this: a count beyond it is damaged.
MAX_LATENCIES = 1 << 31


class Records(Run):
    """One run as arrays. `kvhook.Trace` is this, with a summary and exports. See `Run` for its arguments."""

    def go_over(self, take: Callable[[Slots, Layout], None], *, warmup: bool = True) -> bool:
        """One pass over the run: calls `take` with usable slots and their layout, in the order of the run.

        What is known of the engines is found on the way, if it has not been found before.

        Args:
            take: what is called.
            warmup: go on where a scope turns out to be a warm-up.

        Returns:
            Whether the end was reached.
        """
        engines = Engines(self._after)
        known = [self._more_events] if self._more_events is not None else []
        for source in self.sources:
            engines.begin(source)
            for slots in source.chunks():
                usable = engines.take(slots)
                if not warmup and any(s.warmup for events in (engines.events, *known) for s in events.scopes.values()):
                    return False
                take(usable, source.layout)
        self._found(engines)
        return True

    def steps(
        self, engine: int | None = None, *, complete: bool = False, columns: Sequence[str] | None = None
    ) -> Table:
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

        Times are those of the monotonic clock of the machine that recorded. Beside each there is the same moment in
        nanoseconds since 1970, as logs of other tools have it: ``t_end_unix_ns`` beside ``t_end_ns``. A long run has
        more columns than memory may hold. With `columns` only these are read:

        >>> steps = trace.steps(columns=["step", "kv_cache_usage"])
        >>> steps.dtype.names, steps.itemsize, trace.steps().itemsize
        (('step', 'kv_cache_usage'), 16, 384)

        Args:
            engine: only the steps of this engine.
            complete: only steps that brought the scheduler's stats, so that every state is known.
            columns: only these columns, in this order.

        Returns:
            A structured array with the columns of `kvhook.schema.STEP_FIELDS` that this vLLM fills, and ``engine``,
            the number of the engine in its process.

        Raises:
            KvhookError: there is no such column.
        """
        return self._gather("step", engine, columns, complete=complete)

    def requests(self, engine: int | None = None, *, columns: Sequence[str] | None = None) -> Table:
        """One row per finished request, in the order of finishing: the columns of `kvhook.schema.REQUEST_FIELDS`
        that this vLLM fills, and ``engine``. ``finish_reason`` is text. At level light there are none.

        >>> requests = kvhook.open("run.kvh").requests()
        >>> print(requests[["request", "finish_reason", "num_prompt_tokens", "num_cached_tokens"]][:3])
        [(0, 'length', 72,  0) (1, 'length', 72, 64) (2, 'length', 72, 64)]

        Args:
            engine: only the requests of this engine.
            columns: only these columns, in this order.

        Raises:
            KvhookError: there is no such column.
        """
        return self._gather("request", engine, columns)

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
        there = {c.name for c in self.columns("step")}
        wanted = [name for what in ("count", "min", "max") if (name := f"{prefix}_{what}") in there]
        steps = self.steps(engine, columns=wanted)
        if not has(steps, f"{prefix}_count"):
            return np.empty(0), np.empty(0, np.int64)
        count, low, high = (steps[f"{prefix}_{what}"] for what in ("count", "min", "max"))
        count = np.where((count >= 0) & (count < MAX_LATENCIES), count, 0)
        # what the step records tell by themselves: equal values, and pairs; see the compiler
        equal, pair = (count > 0) & (low == high), (count == 2) & (low != high)
        values = [low[equal], low[pair], high[pair]]
        counts = [count[equal], np.ones(2 * pair.sum(), np.int64)]
        for _, _, single in self.latency_lists(series, engine):
            values.append(single)
            counts.append(np.ones(len(single), np.int64))
        return np.concatenate(values), np.concatenate(counts)

    def latency_lists(
        self, series: str, engine: int | None = None
    ) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64]]]:
        """Engines, steps and values of the latencies of a series that step records do not tell by themselves, some
        thousands at a time. A step record tells its values where they are equal (they are its min and max), and where
        there are two of them."""
        code = VALUE_SERIES.index(series)
        for slots, layout in self._slots(VALUES, engine):
            fields = fields_of(slots, layout.columns["values"])
            first = FIELDS_AT + 8 * len(layout.columns["values"])
            room = layout.values_per_slot
            lists = np.ascontiguousarray(slots[:, first : first + 8 * room]).view("<f8")
            inside = np.arange(room) < np.clip(fields["count"], 0, room)[:, None]
            inside &= (fields["series"] == code)[:, None]
            counts = inside.sum(axis=1)
            engines = np.repeat(slot_head(slots)["engine"].astype(np.int64), counts)
            yield engines, np.repeat(fields["step"], counts), lists[inside]

    def all_columns(self, kind: str) -> list[str]:
        """The names of all columns of ``"step"`` or ``"request"`` records in order, those of the time since 1970 behind
        their monotonic ones."""
        of = {clock: name for name, clock in _UNIX[kind].items()}
        names = ["engine", *(c.name for c in self.columns(kind))]
        return [each for name in names for each in (name, *((of[name],) if name in of else ()))]

    def chunks(self) -> Iterator[tuple[Slots, Layout]]:
        """All usable slots in the order of the run, some thousands at a time, with their layout."""
        for source in self.sources:
            for slots in source.chunks():
                yield slots[usable(slots)], source.layout

    def table(self, slots: Slots, layout: Layout, kind: str) -> Table:
        """Raw slots of one kind as the structured array that `steps` and `requests` give."""
        out = np.empty(len(slots), self._types(kind, None))
        _fill(out, slots, layout, kind, self)
        return out

    def _types(self, kind: str, columns: Sequence[str] | None) -> list[tuple[str, str]]:
        there = {"engine": "<i8"} | {c.name: "U12" if c.enum else c.type for c in self.columns(kind)}
        there |= {name: f"U{longest(self.names(name))}" for name in there.keys() & set(NAMES) if kind == "request"}
        there |= {name: "<i8" for name, clock in _UNIX.get(kind, {}).items() if clock in there}
        if columns is None:
            return [(name, there[name]) for name in self.all_columns(kind)]
        for name in columns:
            if name not in there:
                raise KvhookError(f"there is no column {name!r} of {kind}s{self._why_not(kind, name, there)}")
        return [(name, there[name]) for name in dict.fromkeys(columns)]

    def _why_not(self, kind: str, name: str, there: Iterable[str]) -> str:
        why = self.engines.absent(kind).get(name)
        if why is not None:
            return f" in this run: {why}"
        near = difflib.get_close_matches(name, there, 3)
        return f"; near it are {', '.join(near)}" if near else f"; there are {', '.join(there)}"

    def _gather(self, kind: str, engine: int | None, columns: Sequence[str] | None, *, complete: bool = False) -> Table:
        """One array for all rows, filled piece by piece: there is no second copy of them at any moment."""
        types = self._types(kind, columns)
        code = KINDS[kind][0]
        most = self.engines.records  # more rows than these there cannot be; what is not written takes no memory
        out = np.empty(most, types)
        end = 0
        for slots, layout in self._slots(code, engine):
            if complete:
                known = fields_of(slots, layout.columns[kind])["has_scheduler_stats"] == 1
                slots = slots[known]
            begin, end = end, end + len(slots)
            _fill(out[begin:end], slots, layout, kind, self)
        out.resize(end, refcheck=False)
        return out

    def _slots(self, kind: int, engine: int | None) -> Iterator[tuple[Slots, Layout]]:
        for slots, layout in self.chunks():
            head = slot_head(slots)
            mine = head["kind"] == kind
            if engine is not None:
                mine &= head["engine"] == engine
            if mine.any():
                yield slots[mine], layout


def _fill(out: Table, slots: Slots, layout: Layout, kind: str, run: Run) -> None:
    """Fill the columns of a table from raw slots of one kind; what these do not hold is blank."""
    stored = {c.name: c for c in layout.columns[kind]}
    fields = fields_of(slots, layout.columns[kind])
    blanks = {f.name: float(blank(f)) for f in KINDS[kind][1]}
    for name in out.dtype.names or ():
        if name == "engine":
            out[name] = slot_head(slots)["engine"]
        elif name in NAMES and kind == "request":
            out[name] = name_texts(fields[name], run.names(name)) if name in stored else ""
        elif name in _UNIX[kind]:
            clock = _UNIX[kind][name]
            known = clock in stored
            out[name] = run.unix(slot_head(slots)["engine"], fields[clock]) if known else np.int64(-1)
        elif name in stored:
            out[name] = reason_texts(fields[name]) if stored[name].enum else fields[name]
        else:
            out[name] = blanks.get(name, 0)


def longest(names: Mapping[int, str]) -> int:
    """Characters that a column of names needs; a code whose name is not there is a number of up to 20."""
    return max(20, *map(len, names.values())) if names else 20


def name_texts(codes: npt.NDArray[np.int64], names: Mapping[int, str]) -> npt.NDArray[np.str_]:
    """Codes of a column of `NAMES` as text: "" for -1, the number itself where the name is not there."""
    different, where = np.unique(codes, return_inverse=True)
    texts = ["" if code < 0 else names.get(code, str(code)) for code in different.tolist()]
    return np.array(texts, f"U{longest(names)}")[where]


def reason_texts(codes: npt.NDArray[np.int64]) -> npt.NDArray[np.str_]:
    """Finish reasons as text; a code that is newer than this kvhook stays a number."""
    known = np.array(FINISH_REASONS)
    fits = (codes >= 0) & (codes < len(known))
    return np.where(fits, known[np.where(fits, codes, 0)], codes.astype("U12"))
