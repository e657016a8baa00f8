"""What is known of a run beside its records: its engines, its facts, its columns."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from kvhook.errors import TraceFormatError
from kvhook.facts import ANONYMOUS, NEEDED_COLUMNS
from kvhook.records.clock import Clock, Ints, readings_in
from kvhook.records.engine_events import EngineEvent
from kvhook.records.engines import Engines
from kvhook.records.events import Events, Scope, described
from kvhook.records.sources import SlotSource
from kvhook.ring.layout import Column, Header, make_layout

E = TypeVar("E", Scope, EngineEvent)


class Run:
    """One run.

    Args:
        sources: where its slots come from.
        name: what to call it in errors.
        more: what goes into `meta` beside what the slots tell.
        facts: the same for single engines, by their number.
        after: of a part of a run, engine -> the last record before the part; see `Engines`.
        engines: what the slots tell of the engines, where that is known already; it is taken over.
        events: scopes and names beside those that the slots tell.

    Attributes:
        sources: as given.

    Raises:
        TraceFormatError: a source lacks a column that every reader needs.
    """

    def __init__(
        self,
        sources: Sequence[SlotSource],
        name: str,
        more: Mapping[str, Any] | None = None,
        facts: Mapping[int, Mapping[str, Any]] | None = None,
        after: Mapping[int, int] | None = None,
        engines: Engines | None = None,
        events: Events | None = None,
    ) -> None:
        for source in sources:
            if "step" not in source.layout.columns:
                raise TraceFormatError(
                    f"{name} holds what was recorded in an engine core: open the trace beside it, and ask its cores()"
                )
            for kind, needed in NEEDED_COLUMNS.items():
                if missing := needed - {c.name for c in source.layout.columns[kind]}:
                    raise TraceFormatError(f"{name} holds no usable {kind} records: they have no {min(missing)}")
        self.name = name
        self.sources = sources
        self._more, self._more_facts, self._after = dict(more or {}), dict(facts or {}), after
        self._engines: Engines | None = None
        self._meta: dict[str, Any] = {}
        self._scopes: list[Scope] | None = None
        self._engine_events: list[EngineEvent] | None = None
        self._clock: Clock | None = None
        self._clocks: dict[int, Clock] | None = None
        self._more_events = events
        if engines is not None:
            self._found(engines)

    @property
    def engines(self) -> Engines:
        """The facts about each engine, and which of its records are there."""
        if self._engines is None:
            engines = Engines(self._after)
            for source in self.sources:
                engines.scan(source)
            return self._found(engines)
        return self._engines

    def _found(self, engines: Engines) -> Engines:
        if self._engines is None:
            for engine, known in self._more_facts.items():
                engines.add_facts(engine, known)
            if self._more_events is not None:
                engines.events.add(self._more_events)
            engines.leave_out_idle()
            self._engines = engines
        return self._engines

    @property
    def meta(self) -> dict[str, Any]:
        """The facts about the run, see `kvhook.Trace`."""
        if not self._meta:
            self._meta = self._describe() | self._more
            if any(facts.get(ANONYMOUS) for facts in self._meta["engines"]):
                self._leave_out_folders()
        return self._meta

    def _leave_out_folders(self) -> None:
        """Where the files are that an anonymous recording was read from is in no export of it either."""
        self._meta["name"] = ", ".join(os.path.basename(name) for name in self._meta["name"].split(", "))
        self._meta["engines"] = [
            facts | {"trace": os.path.basename(facts["trace"])} if facts.get("trace") else facts
            for facts in self._meta["engines"]
        ]

    @property
    def clock(self) -> Clock:
        """The monotonic clock of this run and the time since 1970."""
        if self._clock is None:
            headers = [s.header for s in self.sources if s.header is not None]
            readings = {header.monotonic_ns: header.realtime_ns for header in headers}
            self._clock = Clock(readings | self.engines.events.clocks)
        return self._clock

    @property
    def scopes(self) -> list[Scope]:
        """The scopes of the run, in the order in which they began: ``with session.scope(...)`` blocks, and the calls of
        ``LLM.generate`` and the like."""
        if self._scopes is None:
            self._scopes = self._with_unix(described(self.engines.events.scopes.values()))
        return self._scopes

    @property
    def engine_events(self) -> list[EngineEvent]:
        """What was done to the engines between their steps, in the order in which it began: sleep and wake-up, new
        weights, a prefix cache that was reset, LoRA adapters that came and went."""
        if self._engine_events is None:
            found = self.engines.events.engine_events
            self._engine_events = self._with_unix([found[number] for number in sorted(found)])
        return self._engine_events

    def _with_unix(self, found: list[E]) -> list[E]:
        """The same with their times since 1970."""
        engines = np.array([one.engines[0] if one.engines else -1 for one in found], np.int64)
        times = (np.array([(one.began_ns, one.ended_ns) for one in found], np.int64).reshape(-1, 2)).T
        began, ended = (self.unix(engines, ns).tolist() for ns in times)
        return [one._replace(began_unix_ns=b, ended_unix_ns=e) for one, b, e in zip(found, began, ended, strict=True)]

    def unix(self, engines: Ints, ns: Ints) -> Ints:
        """Monotonic nanoseconds of these engines as nanoseconds since 1970; -1 where they are not known."""
        out = self.clock.unix(ns)
        for engine, clock in self._own_clocks().items():
            mine = engines == engine
            if mine.any():
                out[mine] = clock.unix(ns[mine])
        return out

    def clock_of(self, engine: int) -> Clock:
        """The clock of an engine: engines of several files may come from several machines."""
        return self._own_clocks().get(engine, self.clock)

    def _own_clocks(self) -> dict[int, Clock]:
        if self._clocks is None:
            told = {e["engine"]: e.get("clocks") for e in self.engines.facts()}
            self._clocks = {engine: Clock(readings_in(raw)) for engine, raw in told.items() if raw}
        return self._clocks

    def names(self, column: str) -> dict[int, str]:
        """What the codes of a column of `kvhook.schema.NAMES` mean."""
        return self.engines.events.names[column]

    @property
    def damaged(self) -> int:
        """Slots that hold no usable record, and are left out."""
        return self.engines.damaged

    @property
    def header(self) -> Header | None:
        """The header of the first file or ring of this run: its process and its clocks."""
        return self.sources[0].header if self.sources else None

    def columns(self, kind: str) -> list[Column]:
        """The columns of ``"step"`` or ``"request"`` records that are live in this run."""
        layouts = [s.layout for s in self.sources] or [make_layout({})]
        columns = {c.name: c for layout in layouts for c in layout.columns[kind]}
        absent = self.engines.absent(kind)
        return [c for c in columns.values() if c.name not in absent]

    def _describe(self) -> dict[str, Any]:
        engines = self.engines.facts()
        first = engines[0] if engines else {}
        lost, dropped = self.engines.lost_and_dropped()
        absent = self.engines.absent("request") | self.engines.absent("step")
        # a name of both kinds of records is absent if neither has it
        live = {c.name for kind in ("request", "step") for c in self.columns(kind)}
        faults = {where: error for each in engines for where, error in each.get("faults", {}).items()}
        clocks = [(s.header.monotonic_ns, s.header.realtime_ns) for s in self.sources if s.header]
        return {
            "name": self.name,
            **{key: first.get(key, "") for key in ("kvhook", "vllm", "python", "adapter")},
            "engines": engines,
            "absent": {n: why for n, why in absent.items() if n not in live},
            "records": self.engines.records,
            "records_lost": lost,
            "records_dropped": dropped,
            "damaged": self.engines.damaged,
            "monotonic_ns": clocks[0][0] if clocks else 0,
            "realtime_ns": clocks[0][1] if clocks else 0,
            "clocks": self.clock.readings,
            "clock_drift_ns": self.clock.drift_ns,
            "scopes": [scope._asdict() for scope in self.scopes],
            "engine_events": [event._asdict() for event in self.engine_events],
            "labels": list(self.names("label").values()),
            "part": "",
            "not_closed": "",
            **({"faults": faults} if faults else {}),
        }
