"""Where kvhook meets vLLM: patches, what happens at each patched call, and which engines are recorded.

- `registry`: the state of the hooks, in one object
- `taps`: how kvhook gets at the stats of one engine; `quiet`: engines whose user left vLLM's stats off
- `own_step`: engines that are driven by another step than vLLM's own
- `engines`: how an engine begins and ends to be recorded
- `unseen`: engines that make steps though nobody saw them being made; `twins`: engines that share their parts
- `wrappers`: what happens at each patched call, the step among them
- `patching`: which names are replaced, all or none, and how they are put back

The functions below are what the rest of kvhook uses.
"""

from __future__ import annotations

from typing import Any

from kvhook.hooks.engines import clock, count_outputs, step_down, watch
from kvhook.hooks.event_loop import EventLoopRecorder
from kvhook.hooks.existing import engines_alive
from kvhook.hooks.patching import arm, disarm, patched
from kvhook.hooks.registry import Owner, building, note_alive, registry
from kvhook.hooks.twins import original_of

__all__ = [
    "EventLoopRecorder",
    "Owner",
    "adapter_of",
    "arm",
    "armed",
    "armed_level",
    "being_built",
    "clock",
    "count_outputs",
    "disarm",
    "engines_alive",
    "engines_seen",
    "existed_before",
    "failed_to_build",
    "flush",
    "is_recorded",
    "is_vllms_step",
    "note_engines_before",
    "patched",
    "requests_seen",
    "stats_turned_off",
    "step_down",
    "unknown_engines",
    "was_recorded",
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
    """Whether an engine is being recorded, or another whose copy it is."""
    return id(engine) in registry.engines or original_of(engine) in registry.engines


def is_vllms_step(step: Any) -> bool:
    """Whether a method is an engine's ``step`` as vLLM has it, with kvhook's wrapper."""
    return any(p.attribute == "step" and step in (p.wrapper, getattr(p.parent, "step", None)) for p in registry.patches)


def engines_seen() -> int:
    """How many engines were recorded, or would be if they sent any stats, since kvhook was installed."""
    return registry.engines_seen


def requests_seen() -> int:
    """How many requests were added to them."""
    return registry.requests_seen


def note_engines_before() -> list[Any]:
    """The engines that exist and are not recorded, at the moment at which kvhook is installed."""
    before = [each for each in engines_alive() if not is_recorded(each)]
    registry.before.clear()
    for each in before:
        note_alive(registry.before, each)
    return before


def stats_turned_off(engine: Any) -> bool:
    """Whether the front end of an engine that is recorded makes no stats any more, because somebody turned them off."""
    if id(engine) not in registry.steps:  # kvhook has given up recording it, and has turned off what it had turned on
        return False
    adapter = registry.adapter_of(engine)
    holder = adapter.holder if adapter is not None else ""
    return getattr(engine, "log_stats", None) is False or (bool(holder) and getattr(engine, holder, None) is None)


def existed_before(engine: Any) -> bool:
    """Whether an engine existed before kvhook was installed."""
    return id(engine) in registry.before


def was_recorded(engine: Any) -> bool:
    """Whether an engine, or one that it is a copy of, was recorded here or in the process that this one comes from."""
    return original_of(engine) is not None


def failed_to_build(engine: Any) -> bool:
    """Whether vLLM raised an error while it made an engine: what is left of it is none."""
    return id(engine) in registry.failed


def unknown_engines() -> list[str]:
    """Where engines were made that kvhook does not know."""
    return list(registry.unknown)


def being_built() -> bool:
    """Whether an engine that will be recorded is being built at this moment."""
    return building.get() is not None
