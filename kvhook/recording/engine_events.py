"""What was done to engines, as it is noted: when a call begins, and when it ends."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any

from kvhook.records.engine_events import DONE, EngineEvent, as_cells

#: So many events are written again when a bounded history begins a new file.
MOST_KEPT = 10_000
#: Nanoseconds between two times that one event is written while calls are added to it.
EVERY_NS = 200_000_000

#: Is given how it ended, see `EngineEvent.outcome`.
End = Callable[[str], None]


class EventsBook:
    """The engine events of one session. Calls may come from any thread.

    Args:
        clock: monotonic nanoseconds.
        written: is called when something is to be written soon.
    """

    def __init__(self, clock: Callable[[], int], written: Callable[[], None]) -> None:
        self._clock, self._written = clock, written
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._events: dict[int, EngineEvent] = {}
        self._unwritten: dict[int, EngineEvent] = {}
        self._last: tuple[int, int] | None = None  # number of the last event, and what had been recorded then
        self._wrote_ns = 0

    def begin(self, kind: str, engines: Sequence[int] = (), detail: str = "", recorded: int = -1) -> End:
        """A call begins. Gives what is to be called when it has ended.

        Args:
            kind: a key of `kvhook.records.engine_events.KINDS`.
            engines: the numbers of the engines it is about.
            detail: more about it.
            recorded: how many records the engines had made by now. If it is given, a call of the same kind as the
                last one, with no record in between, is added to that event.
        """
        with self._lock:
            event = self._same_again(kind, tuple(engines), detail, recorded)
            again = event is not None
            if event is None:
                event = EngineEvent(next(self._numbers), kind, tuple(engines), self._clock(), detail=detail)
                self._keep(event)
            number = event.number
            self._last = number, recorded
        if not again:
            self._wrote_ns = self._clock()
            self._written()
        return lambda outcome: self._end(number, outcome, again)

    def _same_again(self, kind: str, engines: tuple[int, ...], detail: str, recorded: int) -> EngineEvent | None:
        if self._last is None or recorded < 0 or self._last[1] != recorded:
            return None
        last = self._events.get(self._last[0])
        if last is None or (last.kind, last.engines, last.detail, last.outcome) != (kind, engines, detail, DONE):
            return None
        return last

    def _end(self, number: int, outcome: str, again: bool) -> None:
        with self._lock:
            event = self._events.get(number)
            if event is None:
                return
            now = self._clock()
            self._keep(event._replace(ended_ns=now, outcome=outcome, calls=event.calls + again))
            wait = again and now - self._wrote_ns < EVERY_NS
            if not wait:
                self._wrote_ns = now
        if not wait:  # else it is written with the next records
            self._written()

    def _keep(self, event: EngineEvent) -> None:
        self._events[event.number] = self._unwritten[event.number] = event
        while len(self._events) > MOST_KEPT:
            del self._events[next(iter(self._events))]

    def take(self) -> list[list[Any]]:
        """What has not been written yet; it is the caller's now."""
        if not self._unwritten:
            return []
        with self._lock:
            events, self._unwritten = self._unwritten, {}
        return [as_cells(event) for event in events.values()]

    @property
    def due(self) -> bool:
        """Whether something waits to be written."""
        return bool(self._unwritten)

    def everything(self) -> list[list[Any]]:
        """What a new file begins with."""
        with self._lock:
            return [as_cells(event) for event in self._events.values()]
