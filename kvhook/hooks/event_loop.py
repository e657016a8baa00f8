"""Engines without a ``step`` (AsyncLLM): each call of vLLM's ``record`` is one record, in the ring of its rank."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from kvhook import forks
from kvhook.adapters.requests import AbortedRequest
from kvhook.adapters.step_functions import StepFunctions
from kvhook.faults import USERS, pass_on
from kvhook.hooks.registry import NOT_RECORDED_FURTHER

clock = time.monotonic_ns

OpenRank = Callable[[int], "StepFunctions | None"]
Fault = Callable[[str, BaseException, str], None]


class EventLoopRecorder:
    """Publishes at once what is recorded: there is no step whose end could be waited for.

    All methods are called on the engine's event loop.

    Args:
        open_rank: returns the functions of an engine core; called when its first stats come.
        fault: is called with errors; none is raised.
        not_counted: is called when outputs came that nobody counted.
    """

    def __init__(self, open_rank: OpenRank, fault: Fault, not_counted: Callable[[], None] = lambda: None) -> None:
        self._open_rank, self._fault, self._not_counted = open_rank, fault, not_counted
        self._ranks: dict[int, StepFunctions | None] = {}
        self._made_in = forks.generation
        self._added = 0
        self._aborted: list[AbortedRequest] = []
        #: the engine core's outputs whose stats have not been recorded yet
        self._outputs: Any = None

    def record(self, *args: Any, engine_idx: int | None = None, **kwargs: Any) -> None:
        """What vLLM's loggers are given, in vLLM's order of arguments."""
        self._outputs = None
        self._publish(engine_idx or 0, lambda functions, rank: functions.record(*args, engine_idx=rank, **kwargs))

    def take(
        self, scheduler_stats: Any = None, iteration_stats: Any = None, engine_idx: int | None = None, spent: int = 0
    ) -> bool:
        """What the engine core sent, where vLLM's loggers are not asked (level light)."""
        self._publish(
            engine_idx or 0,
            lambda functions, rank: functions.take(scheduler_stats, iteration_stats, engine_idx=rank, spent=spent),
        )
        return False

    def outputs_came(self, outputs: Any) -> None:
        """The engine core sent outputs. If nobody recorded the stats of those before, they are published now."""
        before, self._outputs = self._outputs, outputs
        stats = getattr(before, "scheduler_stats", None)
        if stats is not None:
            self.record(scheduler_stats=stats, engine_idx=getattr(before, "engine_index", 0))
            self._outputs = outputs
            if before.outputs:
                self._not_counted()

    def add(self) -> None:
        """A request was added."""
        self._added += 1

    def abort(self, request: AbortedRequest) -> None:
        """A request was aborted."""
        if not self._ranks or any(self._ranks.values()):
            self._aborted.append(request)

    def flush(self) -> bool:
        """Publish requests that were aborted since the last stats. Returns whether there were any."""
        functions = next((f for f in self._ranks.values() if f is not None), None)
        if functions is None or not self._aborted:
            return False
        self._hand_over_requests(functions)
        return functions.flush()

    def _publish(self, rank: int, give: Callable[[StepFunctions, int], object]) -> None:
        if self._made_in != forks.generation:
            return
        try:
            if rank not in self._ranks:
                self._ranks[rank] = None  # if it fails it is not tried again
                self._ranks[rank] = self._open_rank(rank)
            functions = self._ranks[rank]
            if functions is not None:
                give(functions, rank)
                self._hand_over_requests(functions)
                now = clock()
                functions.publish(now, now)
        except USERS:
            raise
        except BaseException as error:
            pass_on(error)
            if isinstance(rank, int):
                self._ranks[rank] = None
            if not any(self._ranks.values()):  # nobody is left who would record them
                self._aborted.clear()
            self._fault("recording a step", error, NOT_RECORDED_FURTHER)

    def _hand_over_requests(self, functions: StepFunctions) -> None:
        """The front end does not know which engine core a request is for: it is counted with the next stats."""
        for _ in range(self._added):
            functions.add()
        for request in self._aborted:
            functions.abort(request)
        self._added = 0
        self._aborted.clear()
