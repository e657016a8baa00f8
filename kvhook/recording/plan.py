"""What is to be done with a new engine, decided without touching it.

`plan_engine` takes what is known (the adapter, facts about the engine, the user's options) and says what
`kvhook.recording.session.Session.open_engine` has to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from kvhook.adapters.table import Adapter
from kvhook.options import Options

V0_IS_FULL = "V0 makes all its stats in one piece: there is nothing to leave out, so it is recorded in full"
LOGGER_IS_FULL = "a kvhook.StatLogger is given what vLLM makes, and records it in full"

_NO_EFFECT = "max_overhead has no effect on this engine: "
NO_BUDGET_V0 = f"{_NO_EFFECT}V0 makes all its stats in one piece, so there is nothing to leave out"
NO_BUDGET_ON_EVENT_LOOP = (
    f"{_NO_EFFECT}on an event loop (AsyncLLM) there is no step whose time the cost could be a share of"
)


class EnginePlan(NamedTuple):
    """What is to be done with one engine."""

    #: facts about the engine that are recorded
    facts: dict[str, Any]
    #: whether its steps can be timed, so that what kvhook takes can be measured
    timed: bool
    #: whether to measure what vLLM takes to make stats that only kvhook wants
    measure_stats: bool
    #: the most that kvhook may take, as a share of the time inside steps; None for no limit
    max_overhead: float | None
    #: why the engine is not recorded at the level that was asked for; "" if it is
    why_other_level: str
    #: what the user is told
    warnings: tuple[str, ...]


def plan_engine(adapter: Adapter, facts: Mapping[str, Any], options: Options) -> EnginePlan:
    """Decide how an engine is recorded.

    Args:
        adapter: the tables that fit this vLLM and this kind of engine.
        facts: what is known of the engine: ``timed_steps`` and ``stats_on`` decide, the others are recorded.
        options: what the user chose.
    """
    timed = bool(facts["timed_steps"])
    can_step_down = timed and adapter.has_levels
    recorded, warnings = dict(facts), []
    if options.max_overhead is not None:
        recorded["max_overhead"] = float(options.max_overhead)
        if not can_step_down:
            warnings.append(NO_BUDGET_V0 if timed else NO_BUDGET_ON_EVENT_LOOP)
    why = ""
    if adapter.level != options.level:
        why = LOGGER_IS_FULL if adapter.has_levels else V0_IS_FULL
        warnings.append(f"level={options.level!r}: {why}")
    return EnginePlan(
        facts=recorded,
        timed=timed,
        measure_stats=timed and not facts["stats_on"],
        max_overhead=recorded.get("max_overhead") if can_step_down else None,
        why_other_level=why,
        warnings=tuple(warnings),
    )
