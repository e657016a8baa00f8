"""A recorded run: `Trace`, and what opens one."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvhook.analysis.peaks import PEAKS, NotJoined, Peaks, peaks_of
from kvhook.analysis.windows import windows_of
from kvhook.errors import KvhookError, TraceFormatError
from kvhook.export import export, export_to_folder
from kvhook.export.hive import is_folder
from kvhook.exported import READERS, exported_by_kvhook, read_run, runs_in
from kvhook.options import as_path
from kvhook.parts import Parts
from kvhook.places import instead_of, several
from kvhook.records.core import CoreRecords
from kvhook.records.engines import Engines
from kvhook.records.events import Events
from kvhook.records.imported import Exported, SlotsInMemory, as_source
from kvhook.records.imported_core import as_cores
from kvhook.records.left import rest_of
from kvhook.records.selection import places_of
from kvhook.records.sources import ArraySlots, FileSlots, RenumberedSlots, SlotSource
from kvhook.records.whose import Front, cores_of, shifted
from kvhook.ring.layout import Header
from kvhook.ring.notes import read_notes
from kvhook.ring.reader import RingReader
from kvhook.ring.trace_file import header_of
from kvhook.schema import NAMES, STEP_FIELDS, unix_columns
from kvhook.text.windows import PrintedWindows
from kvhook.text.windows import printed as printed_windows
from kvhook.whatif.mooncake import REQUEST_SUFFIXES, looks_like_requests
from kvhook.whatif.mooncake import read as read_requests
from kvhook.whatif.recorded import recorded_requests
from kvhook.whatif.report import Run as WhatIfRun
from kvhook.whatif.report import WhatIf, what_if
from kvhook.whatif.requests import BlockRequests
from kvhook.whatif.runs import run_of, with_names

if TYPE_CHECKING:
    from kvhook.records.columns import Table
    from kvhook.ring.slots import Slots

_PART = "this is a part of a run, whose steps cannot be counted from the beginning"
_CLOCKS = {clock: name for name, clock in unix_columns(STEP_FIELDS).items()}
#: the columns of steps, each monotonic time with the time since 1970 behind it
_ORDER = tuple(name for f in STEP_FIELDS for name in (f.name, _CLOCKS.get(f.name)) if name is not None)


class Trace(Parts):
    """One recorded run.

    Made by `kvhook.open` from a file, by ``session.trace()`` from a running session, and by the command line from the
    ring of another process.

    Attributes:
        meta: facts about the run. `kvhook.schema.RUN_FIELDS` is the list of them, and `kvhook.schema.FACT_FIELDS` that
            of the facts about each engine, in ``meta["engines"]``. An example::

                >>> meta = kvhook.open("run.kvh").meta
                >>> meta["vllm"], meta["records"], meta["records_lost"], meta["damaged"]
                ('0.32.0', 71, 0, 0)
                >>> (engine,) = meta["engines"]
                >>> engine["model"], engine["num_kv_blocks"], engine["block_size"], engine["enable_prefix_caching"]
                ('tiny-llama', 11, 32, True)
                >>> meta["absent"]["num_swapped_reqs"]
                "vLLM's v1 engine has no such number"
    """

    #: gives the engine cores of a run whose session is there
    of_session: Callable[[], CoreRecords] | None = None
    #: the requests of a file that holds nothing but those
    sent: BlockRequests | None = None
    #: the files of the front end; None for one, which the run is called by
    fronts: tuple[Front, ...] | None = None

    def cores(self) -> CoreRecords:
        """What was recorded inside the engine cores of this run. Their files lie beside those that were opened, and
        are found by their names and by what they say of their processes; one that several front ends share is there
        once. Without any, ``cores().why_none`` says so."""
        if self.of_session is not None:
            return self.of_session()
        return cores_of(self.fronts or [Front(Path(self.name))], self.engines.facts(), self.name)

    def __reduce__(self) -> Any:
        """A trace is pickled with all its records, so that it can be read where its file is not. The records of engine
        cores stay in the files beside it."""
        sources = [(s.layout, s.header, np.concatenate([*s.chunks(), _no_slots(s)])) for s in self.sources]
        return _unpickled, (sources, self.name, self._more, self.engines, self.fronts)

    def block_requests(self) -> BlockRequests:
        """The requests with an id for each of their full blocks; equal ids are equal prefixes. The run must have been
        recorded with ``core="blocks"``, or come from a file of requests with ``hash_ids``.

        Raises:
            NotKnown: the run does not tell; the message says why.
        """
        if self.sent is not None:
            return self.sent
        cores = self.cores()
        return with_names(recorded_requests(cores), cores, self.core_labels)

    def what_if(self, *, blocks: Sequence[int] = (), reorder: bool = False, replicas: Sequence[int] = ()) -> WhatIf:
        """What another KV cache would have found: see ``docs/howto/whatif.md``.

        Args:
            blocks: sizes of the cache, in blocks that can be used; some that tell the most if none are given.
            reorder: also with the requests in longest-prefix-first order.
            replicas: also with so many engines behind a router.

        Raises:
            NotKnown: the run does not tell; the message says why.
        """
        known = (self.sent, WhatIfRun(name=self.name)) if self.sent is not None else run_of(self.cores(), self.name)
        return what_if(*known, blocks=blocks, reorder=reorder, replicas=replicas)

    def steps(  # noqa: D102 - its documentation is that of `Records.steps`, see below
        self, engine: int | None = None, *, complete: bool = False, columns: Sequence[str] | None = None
    ) -> Table:
        there = {column.name for column in self.columns("step")}
        wanted = [name for name in PEAKS if name not in there and (columns is None or name in columns)]
        if not wanted or "has_scheduler_stats" not in there:
            return super().steps(engine, complete=complete, columns=columns)
        try:
            peaks = self._peaks(there)
        except NotJoined as why:
            if columns is None:
                return super().steps(engine, complete=complete)
            reason = self.engines.absent("step").get(wanted[0], "")
            raise KvhookError(f"there is no column {wanted[0]!r} of steps in this run: {reason}; {why}") from None
        return self._with_peaks(peaks, wanted, engine, complete, columns)

    steps.__doc__ = Parts.steps.__doc__

    def _peaks(self, there: set[str]) -> Peaks:
        """Peaks inside steps out of the engine cores' records, for each step of the run."""
        if self.whole is not None:
            # front end and core are joined by counting steps from the beginning
            every, mine = (t.steps(columns=("engine", "step")) for t in (self.whole, self))
            at = places_of(every, mine)
            return Peaks(*(column[at] for column in self.whole._peaks(there)))  # noqa: SLF001 (of this very class)
        meta = self.meta
        if meta["part"]:
            raise NotJoined(_PART)
        return peaks_of(self.steps_to_join(), self.cores(), meta["engines"], self.missing())

    def _with_peaks(
        self, peaks: Peaks, wanted: Sequence[str], engine: int | None, complete: bool, columns: Sequence[str] | None
    ) -> Table:
        """The table of steps with columns that the front end does not record."""
        asked = None if columns is None else [n for n in dict.fromkeys(columns) if n not in wanted]
        more = () if asked is None else tuple({"engine", "has_scheduler_stats"}.difference(asked))
        table = super().steps(columns=asked if asked is None else [*asked, *more])
        of = {name: table.dtype[name] for name in table.dtype.names or ()}
        of |= {name: getattr(peaks, name).dtype for name in wanted}
        order = columns if columns is not None else [n for n in ("engine", *_ORDER) if n in of]
        out = np.empty(len(table), [(name, of[name]) for name in dict.fromkeys(order)])
        for name in out.dtype.names or ():
            out[name] = getattr(peaks, name) if name in wanted else table[name]
        chosen = np.ones(len(table), bool)
        if engine is not None:
            chosen &= table["engine"] == engine
        if complete:
            chosen &= table["has_scheduler_stats"] == 1
        return out if chosen.all() else out[chosen]

    def windows(self, count: int, engine: int | None = None) -> PrintedWindows:
        """The run in so many windows of equal time: ``print`` it for pictures and a table, ``.as_dict()`` for programs,
        ``.numbers`` for arrays.

        >>> windows = kvhook.open("run.kvh").windows(4)
        >>> windows.numbers["steps"].tolist()
        [2.0, 4.0, 13.0, 37.0]

        Args:
            count: how many windows.
            engine: only this engine of the run.
        """
        return printed_windows(windows_of(self, count, engine))

    def _repr_html_(self) -> str:
        """What a notebook shows: KV usage over time, and the summary."""
        from kvhook.text.notebook import trace_html

        there = {c.name for c in self.columns("step")}
        steps = self.steps(columns=[name for name in ("t_end_ns", "kv_cache_usage") if name in there])
        return trace_html(self.name, self.summary(), steps)

    def dump(
        self,
        path: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        compress: bool = False,
        run: str | None = None,
    ) -> list[Path]:
        """Write the whole run to a file; its suffix says how: ``.parquet``, ``.arrow``, ``.jsonl``, ``.csv``, ``.kvh``,
        or ``.perfetto.json.gz`` for https://ui.perfetto.dev.

        A path that ends in ``/``, or that is a folder, is for the Parquet files of many runs: then this run goes into
        ``PATH/run=NAME/engine=N/``, so that DuckDB, Polars or Spark read them all with one pattern.

        Parquet and Arrow need pyarrow (``pip install "kvhook[arrow]"``).

        Args:
            run: in a folder of many runs, the name of this one; without it, that of its file.
            overwrite: replace a file that is there; without it, that is an error.
            compress: a ``.kvh`` file in a tenth of the space, which opens like any other. With zstd where that is
                installed (``pip install "kvhook[fast]"``), else with zlib.

        Returns:
            The files that were written, a file for each table (``.jsonl`` and ``.kvh`` are a single one).

        Raises:
            ExportError: unknown suffix, a package is missing, or the file exists.
            OSError: it cannot be written; what was there before is untouched.
        """
        if is_folder(path):
            name = Path(self.name).stem if run is None else run
            return export_to_folder(self, Path(path), name, cores=self.cores(), overwrite=overwrite)
        return export(self, Path(path), cores=self.cores(), overwrite=overwrite, compress=compress)


def open_trace(path: str | os.PathLike[str], *more: str | os.PathLike[str]) -> Trace:
    """Open a recorded run: a ``.kvh`` trace, or the ring of a process, living or dead; or what was exported from one, a
    ``.parquet``, ``.arrow``, ``.csv`` or ``.jsonl`` file, with the files beside it. Or a ``.jsonl`` file of requests
    with ``hash_ids``, as ``kvhook export --format mooncake`` writes it, for `Trace.what_if`.

    A trace that was cut off anywhere opens up to its last whole record.

    >>> trace = kvhook.open("run.kvh")
    >>> len(trace.steps()), len(trace.requests())
    (56, 12)
    >>> both = kvhook.open("run.kvh", "light.kvh")
    >>> [(engine["engine"], engine["trace"], engine["adapter"]) for engine in both.meta["engines"]]
    [(0, 'run.kvh', 'v1'), (1, 'light.kvh', 'v1-light')]

    Args:
        path: the file; or a folder, or a pattern such as ``"run*.kvh"``, for all the traces in it; or a folder of many
            exported runs, ``PATH/run=NAME/engine=N/``, or one run of it.
        more: further runs, of any vLLM, to have side by side in one trace: then ``engine`` counts the engines of all
            of them, in the order of the files, and ``meta["engines"]`` says of each which ``trace`` it is from. A
            column that only some of them fill is blank in the others.

    Raises:
        TraceFormatError: it is neither, is damaged, or was written by a kvhook whose layout this one does not read.
        KvhookError: there is no such file, or it cannot be read.
    """
    if more:
        return _side_by_side([open_trace(one) for one in (path, *more)])
    place = Path(as_path("path", path))
    try:
        if place.is_dir() and (runs := runs_in(place)):
            with exported_by_kvhook(place):
                exports = [_of_export(*read_run(run)) for run in runs]
            return exports[0] if len(exports) == 1 else _side_by_side(exports)
    except OSError as error:
        raise KvhookError(f"cannot open {place}: {error.strerror or error}") from None
    if found := several(place):
        return open_trace(*found)
    try:
        if not place.is_file():
            # a pipe or a device would make us wait for what never comes
            os.stat(place)
            raise TraceFormatError(f"{place} is not a file")
        if place.suffix in REQUEST_SUFFIXES and looks_like_requests(place):
            return _of_requests(place)
        if place.suffix in READERS:
            with exported_by_kvhook(place):
                return _of_export(READERS[place.suffix](place), str(place))
        if not (header := header_of(place)).capacity:
            trace = open_files([place], str(place))
            rings, why = rest_of(header, lambda: trace.engines, place)
            if why:
                trace = Trace([*trace.sources, *rings], str(place), {"not_closed": why})
            trace.fronts = (Front(place.absolute()),)  # its cores are looked for when somebody asks for them
            return trace
        with RingReader(place) as reader:
            return from_slots(reader.now(), reader.header, str(place), read_notes(place))
    except OSError as error:
        raise KvhookError(f"cannot open {place}: {error.strerror or error}{instead_of(place)}") from None


def _of_export(exported: Exported, name: str) -> Trace:
    source, engines, more = as_source(exported, name)
    trace = Trace([source], name, more, engines=engines)
    cores = as_cores(exported.tables, exported.cores, name)
    if cores is not None:
        trace.of_session = lambda: cores
    return trace


def _of_requests(place: Path) -> Trace:
    """Requests that were sent to no engine that kvhook saw: there are no steps, only what they have in common."""
    trace = Trace([], str(place))
    trace.sent = read_requests(place)
    return trace


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
        files = [FileSlots(path, opened[i] if opened else None) for i, path in enumerate(paths)]
        return Trace(files, name, more, facts)
    except OSError as error:
        raise KvhookError(f"cannot read {error.filename or name}: {error.strerror or error}") from None


def _side_by_side(traces: Sequence[Trace]) -> Trace:
    """Several traces as one."""
    sources: list[SlotSource] = []
    facts: dict[int, dict[str, Any]] = {}
    events = Events()
    firsts: list[int] = []
    scopes, done, codes = 0, 0, dict.fromkeys(NAMES, 0)
    for trace in traces:
        firsts.append(first := len(facts))
        known = {e["engine"]: e for e in trace.meta["engines"]}
        numbers = range(max(known, default=-1) + 1)
        clocks = {n: {"clocks": trace.clock_of(n).readings} for n in numbers}
        facts |= {first + n: known.get(n, {}) | {"trace": trace.name} | clocks[n] for n in numbers}
        sources += [RenumberedSlots(source, first, dict(codes)) for source in trace.sources]
        theirs = trace.engines.events
        events.add(theirs.moved(scopes, range(first, len(facts)), codes, done))
        scopes += max(theirs.scopes, default=-1) + 1
        done += max(theirs.engine_events, default=-1) + 1
        codes = {column: code + max(theirs.names[column], default=-1) + 1 for column, code in codes.items()}
    damaged = sum(trace.damaged for trace in traces)
    name = ", ".join(t.name for t in traces)
    not_closed = "; ".join(why for trace in traces if (why := str(trace.meta["not_closed"])))
    together = Trace(sources, name, {"damaged": damaged, "not_closed": not_closed}, facts, events=events)
    _join_cores(together, traces, firsts)
    return together


def _join_cores(together: Trace, traces: Sequence[Trace], firsts: Sequence[int]) -> None:
    """The engine cores of several traces as those of one. `firsts` says which number each trace's engine 0 has."""
    ends = [*firsts[1:], len(together.engines.facts())]
    files: list[Front] = []
    for trace, first, end in zip(traces, firsts, ends, strict=True):
        for front in () if trace.of_session else trace.fronts or [Front(Path(trace.name))]:
            numbers = range(end - first) if front.engines is None else front.engines
            files.append(front._replace(engines=[first + number for number in numbers]))
    together.fronts = tuple(files)
    kept = [(trace.of_session, range(first, end)) for trace, first, end in zip(traces, firsts, ends, strict=True)]
    if any(of_session for of_session, _ in kept):

        def of_session() -> CoreRecords:
            beside = cores_of(files, together.engines.facts(), together.name)
            mine = [shifted(of(), engines) for of, engines in kept if of is not None]
            return CoreRecords.together([beside, *mine], together.name)

        together.of_session = of_session


def _no_slots(source: SlotSource) -> Slots:
    return np.empty((0, source.layout.slot_bytes), np.uint8)


def _unpickled(
    sources: Any, name: str, more: dict[str, Any], engines: Engines, fronts: tuple[Front, ...] | None = None
) -> Trace:
    there = [SlotsInMemory(layout, slots, header) for layout, header, slots in sources]
    trace = Trace(there, name, more, engines=engines)
    trace.fronts = fronts
    return trace


def from_slots(slots: Slots, header: Header, name: str, notes: Sequence[list[Any]] = ()) -> Trace:
    """Slots that came out of a ring as a trace, with what is noted beside it."""
    events = Events()
    events.take(list(notes))
    return Trace([ArraySlots(slots, header)], name, events=events)
