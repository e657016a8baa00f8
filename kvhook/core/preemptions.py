"""Preemptions: requests that give their blocks to others, and wait until they are scheduled again."""

from __future__ import annotations

import time
from collections.abc import Callable, Container
from typing import TYPE_CHECKING, Any

from kvhook.core.lives import Life
from kvhook.core.prefills import Prefills
from kvhook.faults import contained

if TYPE_CHECKING:
    from kvhook.adapters.core import Core
    from kvhook.core.taps import Taps
    from kvhook.core.writer import Writer

clock = time.monotonic_ns


class Preemptions:
    """Follows the call by which a scheduler preempts a request.

    Attributes:
        lives: request id -> what is known of it, for each request that was preempted and waits.
    """

    def __init__(
        self,
        core: Core,
        writer: Writer,
        prefills: Prefills,
        life_of: Callable[[Any], Life],
        failed: Callable[[BaseException], None],
    ) -> None:
        self._core, self._writer, self._state = core, writer, writer.state
        self._prefills, self._life_of, self._failed = prefills, life_of, failed
        self.lives: dict[str, Life] = {}

    def tap(self, taps: Taps) -> None:
        """Put the counting in place."""
        if self._core.preempt == "free":
            taps.put(self._core.manager, "free", self._on_manager_free)
        else:
            taps.put(self._core.sched, self._core.preempt, self._on_preempt)

    def over(self, requests: Container[str], now: int) -> list[tuple[str, Life]]:
        """Those of the waiting requests that are among these do not wait any more: they are scheduled, or they end."""
        ended = [(request_id, life) for request_id, life in self.lives.items() if request_id in requests]
        for request_id, life in ended:
            del self.lives[request_id]
            life.preempted_ns += now - life.preempted_at
        return ended

    def _on_preempt(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def _preempt_request(request: Any, *args: Any, **kwargs: Any) -> Any:
            return self._watch_preemption(original, request, args, kwargs)

        return _preempt_request

    def _on_manager_free(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def free(request: Any, *args: Any, **kwargs: Any) -> Any:
            # a running request that gives back its blocks is being preempted: one that ends is not running any more
            if self._is_preempted(request):
                return self._watch_preemption(original, request, args, kwargs)
            return original(request, *args, **kwargs)

        return free

    def _is_preempted(self, request: Any) -> bool:
        with contained(self._failed):
            return bool(request.status.name == "RUNNING")
        return False

    def _watch_preemption(
        self, original: Callable[..., Any], request: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        state, lost, freed = self._state, 0, 0
        with contained(self._failed):
            lost, freed = request.num_computed_tokens, state.freed
        result = original(request, *args, **kwargs)
        with contained(self._failed):
            life = self._life_of(request)
            life.preempted_at = clock()
            life.preemptions += 1
            life.high = max(life.high, lost)
            self._prefills.lives.pop(request.request_id, None)
            self.lives[request.request_id] = life
            state.num_preempted += 1
            self._writer.preemption(state.step, life, lost, state.freed - freed)
        return result
