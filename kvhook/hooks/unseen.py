"""Engines whose ``step`` runs although nobody records it: kvhook did not see them being made.

A copy of an engine (``copy.copy``, or an object that took over another's ``__dict__``), an engine of the parent that a
forked child drives, a subclass whose ``__init__`` calls none of vLLM's. Each is recorded from that step on, or it is
said why it cannot be.
"""

from __future__ import annotations

from typing import Any

from kvhook.adapters.step_functions import PublishStep
from kvhook.adapters.table import Adapter
from kvhook.errors import StatsOffError
from kvhook.faults import USERS
from kvhook.hooks.engines import watch
from kvhook.hooks.quiet import is_quiet
from kvhook.hooks.registry import registry
from kvhook.hooks.twins import original_of


def recorder_of(engine: Any) -> PublishStep | None:
    """What publishes the step that an engine is about to make; None if it is not recorded.

    Called in each step of an engine that is not in `Registry.steps`.
    """
    key = id(engine)
    if registry.owner is None or key in registry.left or key in registry.engines:
        return None
    try:
        original = original_of(engine)
        if original in registry.engines:
            return _with(engine, original)
        adapter = registry.adapter_of(engine)
        return None if adapter is None or key in registry.before else _begin(engine, adapter, original)
    except USERS:
        raise
    except BaseException as error:
        registry.leave(engine)
        registry.fault("looking at an engine that was not seen being made", error, "this engine is not recorded")
        return None


def _with(engine: Any, original: int) -> PublishStep | None:
    """Record a copy with the engine whose parts it has: these have what records them both."""
    record, key = registry.records.get(original), id(engine)
    if record is not None and key not in registry.records:  # V0: the stats pass the engine itself
        registry.records[key] = record
        registry.engines[original].record_keys += (key,)
    return registry.steps.get(original)


def _begin(engine: Any, adapter: Adapter, original: int | None) -> PublishStep | None:
    """Record an engine from its next step on, if that can be done."""
    quiet = is_quiet(engine, adapter)
    name = type(engine).__qualname__
    try:
        if original is None and not quiet and getattr(engine, "log_stats", None) is False:
            raise StatsOffError("its stats are off: pass disable_log_stats=False where it is made")
        if not watch(engine, stats_were_on=not quiet, built_by_us=original is not None or quiet):
            registry.leave(engine)
            return None
    except StatsOffError as error:
        registry.leave(engine)
        registry.warn_once(
            "kvhook: the steps of an engine (%s) are not recorded. kvhook did not see it being made, and %s",
            name,
            str(error),
        )
        return None
    registry.warn_once(
        "kvhook: an engine (%s) is recorded from its present step on. kvhook did not see it being made: it is a copy of"
        " another, it is from the process that this one was forked from, or its __init__ calls none of vLLM's",
        name,
    )
    return registry.steps.get(id(engine))
