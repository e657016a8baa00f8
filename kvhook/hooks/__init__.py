"""Where kvhook meets vLLM: patches, what happens at each patched call, and which engines are recorded.

- `registry`: the state of the hooks, in one object
- `taps`: how kvhook gets at the stats of one engine; `quiet`: engines whose user left vLLM's stats off
- `engines`: how an engine begins and ends to be recorded
- `wrappers`: what happens at each patched call, the step among them
- `patching`: which names are replaced, all or none, and how they are put back

The functions below are what the rest of kvhook uses.
"""

from __future__ import annotations

from typing import Any

from kvhook.hooks.engines import clock, step_down, watch
from kvhook.hooks.event_loop import EventLoopRecorder
from kvhook.hooks.existing import engines_alive
from kvhook.hooks.patching import arm, disarm, patched
from kvhook.hooks.registry import Owner, building, registry

__all__ = [
    "EventLoopRecorder",
    "Owner",
    "adapter_of",
    "arm",
    "armed",
    "armed_level",
    "being_built",
    "clock",
    "disarm",
    "engines_alive",
    "flush",
    "is_recorded",
    "patched",
    "requests_waiting",
    "step_down",
    "unknown_engines",
    "watch",
]

adapter_of = registry.adapter_of
flush = registry.flush


def armed() -> bool:
    """Whether there is a session that new engines are recorded into."""
    return registry.owner is not None


def armed_level() -> str:
    """The level at which engines are recorded."""
    return registry.level


def is_recorded(engine: Any) -> bool:
    """Whether an engine is being recorded."""
    return id(engine) in registry.engines


def requests_waiting() -> list[int]:
    """How many requests were added to each engine that is recorded."""
    return [known.added for known in registry.engines.values()]


def unknown_engines() -> list[str]:
    """Where engines were made that kvhook does not know."""
    return list(registry.unknown)


def being_built() -> bool:
    """Whether an engine that will be recorded is being built at this moment."""
    return building.get() is not None
