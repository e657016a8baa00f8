"""A part of a run: what was recorded after a certain moment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from kvhook.ring.reader import slot_head
from kvhook.schema import META
from kvhook.trace import Trace, _Source

if TYPE_CHECKING:
    from kvhook.ring.reader import Slots


class Window(Trace):
    """The records of a trace that came after others; of no engine that did nothing since.

    Args:
        trace: the run.
        after: engine -> the last record that is not to be in it, as `position` gives it.
    """

    def __init__(self, trace: Trace, after: Mapping[int, int]) -> None:
        self._after = after
        more: dict[str, Any] = {name: trace.meta[name] for name in ("faults", "hook_call_ns") if name in trace.meta}
        facts = {engine["engine"]: engine for engine in trace.meta["engines"]}
        super().__init__([_Later(source, after) for source in trace._sources], trace.name, more, facts)

    def _describe(self) -> dict[str, Any]:
        self._engines = {engine: told for engine, told in self._engines.items() if engine in self._numbers}
        return super()._describe()

    def _missing(self, engine: int) -> tuple[int, int]:
        missing, before = super()._missing(engine)
        earlier = self._after.get(engine, -1) + 1
        return max(0, missing - earlier), max(0, before - earlier)


class _Later(_Source):
    """A source without the records up to a certain one of each engine."""

    def __init__(self, source: _Source, after: Mapping[int, int]) -> None:
        super().__init__(source.layout, source.header, source.engines)
        self._all = source
        self._after = after

    def chunks(self) -> Iterator[Slots]:
        for slots in self._all.chunks():
            head = slot_head(slots)
            last = np.full(len(slots), -1, np.int64)
            for engine, n in self._after.items():
                last[head["engine"] == engine] = n
            yield slots[(head["n"] > last) | (head["kind"] == META)]


def position(trace: Trace) -> dict[int, int]:
    """Engine -> its last record so far."""
    return {engine["engine"]: trace.last_record(engine["engine"]) for engine in trace.meta["engines"]}
