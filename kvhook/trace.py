"""A recorded run as numpy arrays: steps, finished requests, single latencies, and what is known of the engines."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kvhook.errors import KvhookError, TraceFormatError
from kvhook.facts import NEEDED_COLUMNS, clean_facts
from kvhook.ring.layout import (
    BODY_AT,
    FIELDS_AT,
    MAX_HEADER,
    MAX_RECORDS,
    Column,
    Header,
    Layout,
    make_layout,
    parse_header,
)
from kvhook.ring.reader import CHUNK_BYTES, RingReader, slot_head
from kvhook.schema import FINISH_REASONS, KINDS, META, VALUE_SERIES, VALUES, blank

if TYPE_CHECKING:
    from kvhook.analysis.summary import Summary
    from kvhook.ring.reader import Slots

#: A process numbers its engines from 0: a record of an engine beyond this is damaged.
MAX_ENGINES = 1 << 16
#: A step does not bring more single latencies than this: a count beyond it is damaged.
MAX_LATENCIES = 1 << 31


class Trace:
    """One recorded run.

    Made by `kvhook.open` from a file, by ``session.trace()`` from a running session, and by the command line from the
    ring of another process.

    Attributes:
        meta: facts: ``kvhook``, ``vllm``, ``python`` versions, ``engines`` (one dictionary per engine), ``absent``
            (column -> why this vLLM cannot fill it), ``records_lost`` and ``records_dropped`` (see `Summary`),
            ``damaged`` (records of the file that were not whole and are left out).
    """

    def __init__(
        self,
        sources: Sequence[_Source],
        name: str,
        more: Mapping[str, Any] | None = None,
        facts: Mapping[int, Mapping[str, Any]] | None = None,
    ) -> None:
        for source in sources:
            for kind, needed in NEEDED_COLUMNS.items():
                if missing := needed - {c.name for c in source.layout.columns[kind]}:
                    raise TraceFormatError(f"{name} holds no usable {kind} records: they have no {min(missing)}")
        self.name = name
        self._sources = sources
        self._engines: dict[int, dict[str, Any]] = {}
        self._numbers: dict[int, tuple[int, int, int]] = {}  # engine -> lowest n, highest n, count
        self.damaged = 0
        self._scan()
        for engine, told in (facts or {}).items():
            self._engines[engine] = self._engines.get(engine, {}) | dict(told)
        self.meta = self._describe() | dict(more or {})

    def steps(self, engine: int | None = None) -> npt.NDArray[np.void]:
        """One row per engine step, in order: a structured array with the columns of `kvhook.schema.STEP_FIELDS` that
        this vLLM fills, and ``engine``, the number of the engine in its process.

        Args:
            engine: only the steps of this engine.
        """
        return self._gather("step", engine)

    def requests(self, engine: int | None = None) -> npt.NDArray[np.void]:
        """One row per finished request, in the order of finishing: the columns of `kvhook.schema.REQUEST_FIELDS`
        that this vLLM fills, and ``engine``. ``finish_reason`` is text."""
        return self._gather("request", engine)

    def latencies(
        self, series: str, engine: int | None = None
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        """Every single value of a series, as different values and how often each occurred.

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
        if f"{prefix}_count" not in (steps.dtype.names or ()):
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

    def summary(self, engine: int | None = None) -> Summary:
        """The run in numbers; ``print`` it for people, ``.as_dict()`` for programs."""
        from kvhook.analysis.summary import summarize

        return summarize(self, engine)

    def dump(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> list[Path]:
        """Write the whole run to a file; its suffix says how: ``.jsonl``, ``.csv`` or ``.kvh``.

        Args:
            overwrite: replace a file that is there; without it, that is an error.

        Returns:
            The files that were written (CSV: steps and requests are two tables).

        Raises:
            ExportError: unknown suffix, or the file exists.
            OSError: it cannot be written; what was there before is untouched.
        """
        from kvhook.export import export

        return export(self, Path(path), overwrite=overwrite)

    def chunks(self) -> Iterator[tuple[Slots, Layout]]:
        """All whole slots in the order of the trace, some thousands at a time, with their layout."""
        for source in self._sources:
            for slots in source.chunks():
                yield slots[_whole(slots)], source.layout

    @property
    def header(self) -> Header | None:
        """The header of the first file or ring of this run: its process and its clocks."""
        return self._sources[0].header if self._sources else None

    def last_record(self, engine: int) -> int:
        """The highest number of an engine's records, -1 if there are none."""
        return self._numbers.get(engine, (0, -1, 0))[1]

    def told(self, engine: int, fact: str) -> int:
        """A count from what the file tells about an engine, 0 if it does not."""
        return int(self._engines.get(engine, {}).get(fact) or 0)

    def columns(self, kind: str) -> list[Column]:
        """The columns of ``"step"`` or ``"request"`` records that are live in this trace."""
        layouts = [s.layout for s in self._sources] or [make_layout({})]
        columns = {c.name: c for layout in layouts for c in layout.columns[kind]}
        absent = self._absent(kind)
        return [c for c in columns.values() if c.name not in absent]

    def table(self, slots: Slots, layout: Layout, kind: str) -> npt.NDArray[np.void]:
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
                out[c.name] = _text(fields[c.name]) if c.enum else fields[c.name]
        return out

    def _gather(self, kind: str, engine: int | None) -> npt.NDArray[np.void]:
        parts = [self.table(slots, layout, kind) for slots, layout in self._slots(KINDS[kind][0], engine)]
        if not parts:
            layout = self._sources[0].layout if self._sources else make_layout({})
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

    def _scan(self) -> None:
        """One pass over the heads: engines, gaps in the numbers, damaged records."""
        for source in self._sources:
            pieces: dict[int, list[bytes]] = {}
            for engine, meta in source.engines.items():
                self._engines[engine] = meta
            for slots in source.chunks():
                whole = _whole(slots)
                self.damaged += int(len(slots) - whole.sum())
                slots = slots[whole]
                head = slot_head(slots)
                is_meta = head["kind"] == META
                for i in is_meta.nonzero()[0]:
                    self._take_meta(slots[i], int(head["engine"][i]), source.layout, pieces)
                self._count(head["engine"][~is_meta], head["n"][~is_meta])

    def _count(self, engines: npt.NDArray[np.int32], n: npt.NDArray[np.int64]) -> None:
        """Add to the lowest number, the highest, and the count of records of each engine."""
        order = np.argsort(engines, kind="stable")
        different, first = np.unique(engines[order], return_index=True)
        if not len(different):
            return
        n = n[order]
        spans = zip(
            different.tolist(),
            np.minimum.reduceat(n, first).tolist(),
            np.maximum.reduceat(n, first).tolist(),
            np.diff(first, append=len(n)).tolist(),
            strict=True,
        )
        for engine, lowest, highest, count in spans:
            low, high, before = self._numbers.get(engine, (lowest, highest, 0))
            self._numbers[engine] = min(low, lowest), max(high, highest), before + count

    def _take_meta(self, slot: Slots, engine: int, layout: Layout, pieces: dict[int, list[bytes]]) -> None:
        if zlib.crc32(slot[BODY_AT:].tobytes()) != int(slot_head(slot[None])["crc"][0]):
            self.damaged += 1
            return
        fields = fields_of(slot[None], layout.columns["meta"])[0]
        begin = FIELDS_AT + 8 * len(layout.columns["meta"])
        parts = pieces.setdefault(engine, [])
        if fields["part"] != len(parts):
            parts.clear()
            if fields["part"]:
                return
        parts.append(slot[begin : begin + int(np.clip(fields["nbytes"], 0, layout.meta_bytes_per_slot))].tobytes())
        if len(parts) == fields["parts"]:
            try:
                facts = clean_facts(json.loads(b"".join(parts)))
                self._engines[engine] = self._engines.get(engine, {}) | facts
            except (ValueError, RecursionError):
                self.damaged += len(parts)
            parts.clear()

    def _describe(self) -> dict[str, Any]:
        engines = [
            {"engine": e} | self._engines.get(e, {}) | {"engine": e}
            for e in sorted(self._engines.keys() | self._numbers.keys())
        ]
        first = engines[0] if engines else {}
        lost, dropped = 0, 0
        for engine in engines:
            missing, before = self._missing(engine["engine"])
            told = sum(self.told(engine["engine"], fact) for fact in ("records_overrun", "records_unwritten"))
            # what is missing before the first record fell out of a bounded history, unless it was never written
            gone = min(missing, max(missing - before, told))
            lost, dropped = lost + gone, dropped + missing - gone
        absent = self._absent("request") | self._absent("step")
        # a name of both kinds of records is absent if neither has it
        live = {c.name for kind in ("request", "step") for c in self.columns(kind)}
        clocks = [(s.header.monotonic_ns, s.header.realtime_ns) for s in self._sources if s.header]
        return {
            "name": self.name,
            **{key: first.get(key, "") for key in ("kvhook", "vllm", "python", "adapter")},
            "engines": engines,
            "absent": {n: why for n, why in absent.items() if n not in live},
            "records": sum(count for _, _, count in self._numbers.values()),
            "records_lost": lost,
            "records_dropped": dropped,
            "damaged": self.damaged,
            "monotonic_ns": clocks[0][0] if clocks else 0,
            "realtime_ns": clocks[0][1] if clocks else 0,
        }

    def _missing(self, engine: int) -> tuple[int, int]:
        """How many records of an engine are not here, and how many of those come before the first that is."""
        published = self.told(engine, "records_published")
        if engine not in self._numbers:
            return published, published
        low, high, count = self._numbers[engine]
        return max(0, max(high + 1, published) - count), low

    def _absent(self, kind: str) -> dict[str, str]:
        """Columns that no engine of this trace fills, with the first engine's reason."""
        missing = [e.get("absent", {}).get(kind, {}) for e in self._engines.values()]
        if not missing:
            return {}
        return {name: why for name, why in missing[0].items() if all(name in m for m in missing)}


class _Source:
    """Where slots come from: a file that is read in chunks, or an array."""

    def __init__(self, layout: Layout, header: Header | None = None, engines: dict[int, dict[str, Any]] | None = None):
        self.layout = layout
        self.header = header
        self.engines = engines or {}

    def chunks(self) -> Iterator[Slots]:
        """The slots in order, whole or not."""
        raise NotImplementedError


class _File(_Source):
    """A ``.kvh`` file. It is held open, so that it can be read even after it was dropped from a bounded history."""

    def __init__(self, path: Path, fd: int | None = None) -> None:
        self._file = open(path, "rb", buffering=0, opener=None if fd is None else lambda *_: fd)  # noqa: SIM115
        try:
            size = os.fstat(self._file.fileno()).st_size
            header = parse_header(os.pread(self._file.fileno(), MAX_HEADER, 0), size, str(path))
            if header.capacity:
                raise TraceFormatError(f"{path} is a ring, not a trace")
        except KvhookError:
            self._file.close()
            raise
        super().__init__(header.layout, header)
        self._count = (size - header.header_bytes) // header.layout.slot_bytes

    def chunks(self) -> Iterator[Slots]:
        assert self.header is not None
        slot = self.layout.slot_bytes
        some = max(1, CHUNK_BYTES // slot)
        for first in range(0, self._count, some):
            count = min(some, self._count - first)
            data = os.pread(self._file.fileno(), count * slot, self.header.header_bytes + first * slot)
            yield np.frombuffer(data[: len(data) // slot * slot], np.uint8).reshape(-1, slot)


class _Array(_Source):
    """Slots in memory: what a ring holds."""

    def __init__(self, slots: Slots, header: Header) -> None:
        super().__init__(header.layout, header, {int(header.meta.get("engine", 0)): header.meta})
        self._slots = slots

    def chunks(self) -> Iterator[Slots]:
        yield self._slots


class _Beside(_Source):
    """A source of one trace among others: its engines have other numbers there."""

    def __init__(self, source: _Source, first_engine: int) -> None:
        super().__init__(source.layout, source.header)
        self._source = source
        self._first_engine = first_engine

    def chunks(self) -> Iterator[Slots]:
        for slots in self._source.chunks():
            slots = slots[_whole(slots)]
            slots = slots[slot_head(slots)["kind"] != META].copy()  # what it tells has been read already
            slot_head(slots)["engine"] += self._first_engine
            yield slots


def open_trace(path: str | os.PathLike[str], *more: str | os.PathLike[str]) -> Trace:
    """Open a recorded run: a ``.kvh`` trace, or the ring of a process, living or dead.

    A trace that was cut off anywhere opens up to its last whole record.

    Args:
        path: the file.
        more: further runs, of any vLLM, to have side by side in one trace: then ``engine`` counts the engines of all
            of them, in the order of the files, and ``meta["engines"]`` says of each which ``trace`` it is from. A
            column that only some of them fill is blank in the others.

    Raises:
        TraceFormatError: it is neither, is damaged, or was written by a kvhook whose layout this one does not read.
        KvhookError: there is no such file, or it cannot be read.
    """
    if more:
        return _beside([open_trace(one) for one in (path, *more)])
    place = Path(path)
    try:
        if not place.is_file():
            # a pipe or a device would make us wait for what never comes
            os.stat(place)
            raise TraceFormatError(f"{place} is not a file")
        with open(place, "rb") as file:
            header = parse_header(file.read(MAX_HEADER), os.fstat(file.fileno()).st_size, str(place))
        if not header.capacity:
            return open_files([place], str(place))
        with RingReader(place) as reader:
            return from_slots(reader.now(), reader.header, str(place))
    except OSError as error:
        raise KvhookError(f"cannot open {place}: {error.strerror or error}") from None
    except ValueError as error:  # a NUL in the name
        raise KvhookError(f"cannot open {str(place)!r}: {error}") from None


def open_files(
    paths: Sequence[Path],
    name: str,
    more: Mapping[str, Any] | None = None,
    facts: Mapping[int, Mapping[str, Any]] | None = None,
    opened: Sequence[int] | None = None,
) -> Trace:
    """Open trace files that together are one run, oldest first.

    Args:
        paths: the files.
        name: what to call them in errors.
        more: what goes into the trace's ``meta`` beside what the files say.
        facts: the same for single engines, by their number.
        opened: a descriptor for each path, which the trace takes over; for files that may have lost their name.

    Raises:
        TraceFormatError: a file is damaged.
        KvhookError: a file cannot be read.
    """
    try:
        files = [_File(path, opened[i] if opened else None) for i, path in enumerate(paths)]
        return Trace(files, name, more, facts)
    except OSError as error:
        raise KvhookError(f"cannot read {error.filename or name}: {error.strerror or error}") from None


def _beside(traces: Sequence[Trace]) -> Trace:
    """Several traces as one."""
    sources: list[_Source] = []
    facts: dict[int, dict[str, Any]] = {}
    for trace in traces:
        first = len(facts)
        told = trace.meta["engines"]
        numbers = range(max((e["engine"] for e in told), default=-1) + 1)
        known = {e["engine"]: e for e in told}
        facts |= {first + n: known.get(n, {}) | {"trace": trace.name} for n in numbers}
        sources += [_Beside(source, first) for source in trace._sources]
    return Trace(sources, ", ".join(t.name for t in traces), {"damaged": sum(t.damaged for t in traces)}, facts)


def from_slots(slots: Slots, header: Header, name: str) -> Trace:
    """Slots that came out of a ring as a trace."""
    return Trace([_Array(slots, header)], name)


def _whole(slots: Slots) -> npt.NDArray[np.bool_]:
    head = slot_head(slots)
    n = head["n"]
    codes = [code for code, _ in KINDS.values()]
    good: npt.NDArray[np.bool_] = (
        (head["stamp"] == (2 * n + 2).astype(np.uint64))
        & (n >= 0)
        & (n < MAX_RECORDS)
        & np.isin(head["kind"], codes)
        & (head["engine"] >= 0)
        & (head["engine"] < MAX_ENGINES)
    )
    return good


def fields_of(slots: Slots, columns: Sequence[Column]) -> npt.NDArray[np.void]:
    """The columns of raw slots, without copying."""
    shape: Any = {
        "names": [c.name for c in columns],
        "formats": [c.type for c in columns],
        "offsets": [c.offset for c in columns],
        "itemsize": slots.shape[1],
    }
    fields: npt.NDArray[np.void] = np.ascontiguousarray(slots).view(np.dtype(shape))[:, 0]
    return fields


def _text(codes: npt.NDArray[np.int64]) -> npt.NDArray[np.str_]:
    """Finish reasons as text; a code that is newer than this kvhook stays a number."""
    known = np.array(FINISH_REASONS)
    fits = (codes >= 0) & (codes < len(known))
    return np.where(fits, known[np.where(fits, codes, 0)], codes.astype("U12"))
