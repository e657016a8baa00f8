"""What is decided for a new engine, without an engine: the plan follows from adapter, facts and options alone."""

from __future__ import annotations

from typing import Any

import pytest

from kvhook.adapters import ADAPTERS, BY_LEVEL, LIGHT_ADAPTERS
from kvhook.adapters.table import Adapter
from kvhook.options import LEVELS, Options
from kvhook.recording.plan import EnginePlan, plan_engine

BY_NAME: dict[str, Adapter] = {a.name: a for a in (*ADAPTERS, *LIGHT_ADAPTERS)}


def plan(adapter: str, options: Options = Options(), **facts: Any) -> EnginePlan:  # noqa: B008 (it is frozen)
    return plan_engine(BY_NAME[adapter], {"timed_steps": True, "stats_on": False, "model": "m"} | facts, options)


def test_the_levels_that_can_be_asked_for_are_those_with_adapters():
    assert set(LEVELS) == set(BY_LEVEL)


def test_an_engine_as_most_people_make_it_is_recorded_as_asked_and_nothing_is_said():
    made = plan("v1")
    assert made.facts == {"timed_steps": True, "stats_on": False, "model": "m"}
    assert (made.timed, made.measure_stats, made.max_overhead) == (True, True, None)
    assert (made.why_other_level, made.warnings) == ("", ())


@pytest.mark.parametrize(("timed", "stats_on", "measured"), [(True, True, False), (False, False, False)])
def test_stats_are_measured_only_where_nobody_else_wants_them_and_there_is_a_step(
    timed: bool, stats_on: bool, measured: bool
):
    assert plan("v1", timed_steps=timed, stats_on=stats_on).measure_stats is measured


def test_a_budget_is_kept_and_recorded_as_a_number():
    made = plan("v1", Options(max_overhead=1))
    assert (made.max_overhead, made.facts["max_overhead"], made.warnings) == (1.0, 1.0, ())
    assert isinstance(made.facts["max_overhead"], float)


@pytest.mark.parametrize(
    ("adapter", "timed", "why"),
    [("v0", True, "V0 makes all its stats in one piece"), ("v1-async", False, "event loop")],
)
def test_a_budget_that_cannot_be_kept_is_recorded_and_said(adapter: str, timed: bool, why: str):
    made = plan(adapter, Options(max_overhead=0.01), timed_steps=timed)
    assert made.max_overhead is None
    assert made.facts["max_overhead"] == 0.01
    (warning,) = made.warnings
    assert "max_overhead has no effect on this engine" in warning
    assert why in warning


@pytest.mark.parametrize(("adapter", "why"), [("v0", "in one piece"), ("v1-async", "kvhook.StatLogger")])
def test_an_engine_that_is_not_recorded_at_the_level_asked_for_says_why(adapter: str, why: str):
    made = plan(adapter, Options(level="light"))
    assert why in made.why_other_level
    assert made.warnings == (f"level='light': {made.why_other_level}",)


def test_the_facts_that_were_given_are_not_changed():
    facts = {"timed_steps": True, "stats_on": True}
    plan_engine(BY_NAME["v1"], facts, Options(max_overhead=0.5))
    assert facts == {"timed_steps": True, "stats_on": True}
