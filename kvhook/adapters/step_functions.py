"""The functions that record one engine, as `kvhook.adapters.publisher` makes them, and how one set follows another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from kvhook.adapters.requests import AbortedRequest

#: ``record(scheduler_stats, iteration_stats, mm_cache_stats, engine_idx)``, in this vLLM's order, takes over the stats
#: of the current step.
Record = Callable[..., None]
#: ``publish(t_start_ns, t_end_ns)`` writes the step, and what belongs to it, into the ring.
PublishStep = Callable[[int, int], None]


class Counters(NamedTuple):
    """Where a publisher continues: the numbers of its next record, step, and finished request."""

    n: int = 0
    step: int = 0
    request_number: int = 0


class Left(NamedTuple):
    """What a publisher has not published yet, for another that continues in its place.

    Attributes:
        n, step, request_number: as in `Counters`.
        added: requests that were added since the last step.
        aborted: requests that were aborted since then.
        uncounted: outputs that the engine core sent for the current step, if nobody has counted them.
    """

    n: int = 0
    step: int = 0
    request_number: int = 0
    added: int = 0
    aborted: tuple[AbortedRequest, ...] = ()
    uncounted: int = 0

    @property
    def counters(self) -> Counters:
        """Where the other one continues."""
        return Counters(self.n, self.step, self.request_number)


class StepFunctions(NamedTuple):
    """The functions that record one engine. They share their state, and belong to the thread that runs the engine.

    Attributes:
        record: what vLLM's loggers are given.
        publish: the step is over: write it into the ring.
        take: what the engine core sent. If the step before was not published, it is published first, without times;
            unless it had outputs and nobody counted them: then nothing is done, and True is returned.
        add: a request was added.
        abort: a request was aborted; its row and its count go out with the next step.
        flush: publish what waits for a step, without times. Returns whether anything did.
        left: returns the numbers of the next record, and what waits for it: a `Left`.
    """

    record: Record
    publish: PublishStep
    take: Callable[..., bool]
    add: Callable[[], None]
    abort: Callable[[AbortedRequest], None]
    flush: Callable[[], bool]
    left: Callable[[], Left]

    @classmethod
    def none(cls) -> StepFunctions:
        """Functions that do nothing, for an engine that is not recorded any more."""

        def nothing(*_: Any, **__: Any) -> None:
            return None

        return cls(nothing, nothing, lambda *_, **__: False, nothing, nothing, lambda: False, Left)
