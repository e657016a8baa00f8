"""An engine's states, read from vLLM's stats objects by the tables of the adapters: those say where each vLLM keeps
a number, and nothing of it is repeated here."""

from __future__ import annotations

import functools
from types import CodeType
from typing import Any

from kvhook.adapters.table import Adapter
from kvhook.adapters.v0 import V0
from kvhook.adapters.v1 import V1
from kvhook.collector.names import STATE, VALUES

_STATES = frozenset(value.name for value in VALUES if value.kind == STATE)


def v1_states(scheduler_stats: Any) -> dict[str, float]:
    """Usage and queues out of V1's SchedulerStats."""
    return _read(V1, {"sched": scheduler_stats})


def v0_states(stats: Any, *, on_cpu: bool) -> dict[str, float]:
    """Usage, queues and hit rate out of V0's Stats. A hit rate below 0, which V0 gives where prefix caching is off,
    stays as it is."""
    return _read(V0, {**V0.helpers, "rate": float, "v0": stats, "on_gpu": not on_cpu})


def _read(adapter: Adapter, sources: dict[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for read in adapter.steps:
        for expression in read.expressions if read.column in _STATES else ():
            try:
                value = eval(_compiled(expression), sources)
            except AttributeError:
                continue  # another release has it there
            if isinstance(value, (int, float)):
                found[read.column] = value
            break
    return found


@functools.cache
def _compiled(expression: str) -> CodeType:
    return compile(expression, "<adapter>", "eval")
