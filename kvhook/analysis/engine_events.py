"""What was done to the engines of a run, counted by kind."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from kvhook.records.engine_events import DONE, KINDS, REFUSED, EngineEvent


class EventTotal(NamedTuple):
    """The engine events of one kind.

    Attributes:
        kind: see `kvhook.records.engine_events.EngineEvent`.
        calls: how many calls there were.
        refused: those in which vLLM returned False, and did nothing.
        failed: those that raised, or had not ended when the process did.
        seconds: what all of them took, as far as they ended.
    """

    kind: str
    calls: int
    refused: int
    failed: int
    seconds: float


def event_totals(
    events: Iterable[EngineEvent], engine: int | None = None, span: tuple[int, int] | None = None
) -> list[EventTotal]:
    """Count events by kind, in the order of `KINDS`.

    Args:
        events: of the run.
        engine: only those of this engine.
        span: only those that began between two moments, monotonic nanoseconds.
    """
    found: dict[str, EventTotal] = {}
    for event in events:
        if engine is not None and event.engines and engine not in event.engines:
            continue
        if span is not None and not span[0] <= event.began_ns <= span[1]:
            continue
        before = found.get(event.kind, EventTotal(event.kind, 0, 0, 0, 0.0))
        found[event.kind] = EventTotal(
            event.kind,
            before.calls + event.calls,
            before.refused + (event.outcome == REFUSED),
            before.failed + (event.outcome not in (DONE, REFUSED)),
            before.seconds + (event.took or 0.0),
        )
    order = list(KINDS)
    return sorted(found.values(), key=lambda t: (order.index(t.kind) if t.kind in order else len(order), t.kind))
