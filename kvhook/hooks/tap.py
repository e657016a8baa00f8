"""What is put into one engine to get at its stats: what it needs to know, and how it is put there and taken out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from kvhook.adapters.step_functions import Record
from kvhook.adapters.table import Adapter
from kvhook.hooks.latest import Latest
from kvhook.hooks.own_step import FirstOutputs, OutputCounts
from kvhook.hooks.quiet import do_nothing
from kvhook.overlays import Overlay

Undo = Callable[[], None]


def no_blocks() -> int:
    """The number of free blocks where the scheduler is in another process."""
    return -1


class Functions(Protocol):
    """What a tap hands over to: `StepFunctions`, or an `EventLoopRecorder`."""

    @property
    def record(self) -> Record:
        """What vLLM's loggers are given."""

    @property
    def take(self) -> Callable[..., bool]:
        """What the engine core sent."""


class Tap(NamedTuple):
    """What a tap needs to know.

    ``records`` is where the patched methods look for their `record`: id of the object that the stats pass -> record.
    ``failed`` is called with an error of kvhook's. ``every``: outputs are counted in one of so many steps (`tap_core`
    alone). ``num_free_blocks`` returns the fewest free KV blocks after a schedule since it was last called, -1 where
    that is not known. ``outputs_came`` is called with the engine core's outputs, on an event loop. ``first`` looks at
    the first outputs at level full, and ``counts`` counts outputs (`tap_own_step`). ``latest`` is told where the counts
    of the latest outputs are (`tap_core`).
    """

    engine: Any
    adapter: Adapter
    functions: Functions
    records: dict[int, Record]
    failed: Callable[[BaseException], None]
    every: int = 1
    facts: Mapping[str, Any] = {}
    num_free_blocks: Callable[[], int] = no_blocks
    outputs_came: Callable[[Any], None] = do_nothing
    first: FirstOutputs | None = None
    counts: OutputCounts | None = None
    latest: Latest = Latest()

    @property
    def record(self) -> Record:
        """What vLLM's loggers are given."""
        return self.functions.record


def both(first: Undo, then: Undo) -> Undo:
    """A function that calls one and then the other."""

    def undo() -> None:
        first()
        then()

    return undo


def replace(*replaced: tuple[Any, str, Callable[..., Any]]) -> Undo:
    """Replace methods of single objects. The function that is returned puts back what was there."""
    overlays = [Overlay(owner, name, function) for owner, name, function in replaced]

    def undo() -> None:
        for overlay in reversed(overlays):
            overlay.take_out()

    return undo
