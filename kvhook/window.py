"""A part of a run: what was recorded after a certain moment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvhook.records.run import Run
from kvhook.records.sources import LaterSlots
from kvhook.trace import Trace


class Window(Trace):
    """The records of a run that came after others; without engines that did nothing since.

    Args:
        trace: the run.
        after: engine -> the last record that is not to be in it, as `position` gives it.
    """

    def __init__(self, trace: Trace, after: Mapping[int, int]) -> None:
        more: dict[str, Any] = {name: trace.meta[name] for name in ("faults", "hook_call_ns") if name in trace.meta}
        facts = {engine["engine"]: engine for engine in trace.meta["engines"]}
        super().__init__([LaterSlots(source, after) for source in trace.sources], trace.name, more, facts, after)


def position(run: Run) -> dict[int, int]:
    """Engine -> its last record so far."""
    return {engine["engine"]: run.engines.last_record(engine["engine"]) for engine in run.meta["engines"]}
