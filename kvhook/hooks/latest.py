"""The counts of an engine's latest outputs, corrected by what happens to its requests before they are published."""

from __future__ import annotations

from collections.abc import Callable

from kvhook.adapters.light import Counts


class Latest:
    """At level light, requests that are gone at the end of a step have finished. Where a loop of somebody's own drives
    the engine, a step is over when the next outputs come, and until then requests may be added and aborted.

    Attributes:
        read: returns the counts of the latest outputs; None if there are none.
    """

    def __init__(self) -> None:
        self.read: Callable[[], Counts | None] = lambda: None

    def added(self) -> None:
        """A request was added."""
        self._move(1)

    def aborted(self) -> None:
        """A request was aborted."""
        self._move(-1)

    def _move(self, by: int) -> None:
        counts = self.read()
        if counts is not None:
            counts.before += by
