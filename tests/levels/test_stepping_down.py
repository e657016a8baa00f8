"""Over the budget an engine is recorded for less, in the same ring; and engines for which that cannot be done."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import kvhook
from kvhook import hooks
from kvhook.adapters import BY_LEVEL
from kvhook.hooks import taps, wrappers
from kvhook.hooks.tap import Tap
from kvhook.recording import budget as cost
from tests.contracts.behaviour import V0_ENGINE, make_engine
from tests.contracts.core import Prompt, Said, Sent, add
from tests.contracts.core_engines import ON_LOOP, SYNC, engines_of
from tests.contracts.light.script import begin, go
from tests.contracts.loader import stubs
from tests.contracts.made_stats import v0_stats
from tests.levels.stepped_down import COUNTED_STEPS, STEPS, over_budget, script

pytestmark = pytest.mark.usefixtures("fresh")


# The ring and the numbers


@pytest.mark.usefixtures("hasty")
def test_over_budget_the_steps_go_on_in_the_same_ring_with_the_same_numbering():
    session, _ = over_budget()
    (ring,) = session.rings
    assert session.faults == {}
    for trace in (session.trace(), kvhook.open(ring)):
        steps = trace.steps()
        assert steps["step"].tolist() == list(range(STEPS))
        assert steps["level"].tolist() == [0] + [1] * 8 + [2] * 31
        # the scheduler's stats are there at every level
        assert steps["num_running_reqs"].tolist() == [2 + i for i in range(STEPS)]
        assert steps["has_scheduler_stats"].tolist() == [1] * STEPS
        assert trace.meta["records_lost"] == trace.meta["records_dropped"] == 0
        assert (steps["t_end_ns"][:-1] <= steps["t_start_ns"][1:]).all()


@pytest.mark.usefixtures("hasty")
def test_outputs_are_counted_in_every_so_many_th_step():
    session, _ = over_budget()
    steps = session.steps()
    assert [i for i in range(STEPS) if steps["has_iteration_stats"][i]] == sorted(COUNTED_STEPS)
    expected = [i + 2 if i in COUNTED_STEPS else 0 for i in range(STEPS)]
    assert steps["num_generation_tokens"].tolist() == expected
    # latencies are those of level full: two first tokens in the first step
    assert steps["ttft_count"].tolist() == [2] + [0] * (STEPS - 1)
    _, counts = session.latencies("time_to_first_token")
    assert counts.sum() == 2


@pytest.mark.usefixtures("hasty")
def test_finished_requests_keep_their_numbers_and_later_ones_are_counted():
    with kvhook.install(max_overhead=1e-9) as session:
        engine = begin(SYNC, script=())
        for i in range(12):
            add(engine, f"r{i}", Prompt(3))
        engine.engine_core.plan += [Sent((Said(f"r{i}", finished=True),)) for i in range(12)]
        go(engine)
        steps = session.steps()
        # the first is a record, the 2nd to 9th are counted, and of the last three the first
        assert session.requests()["step"].tolist() == [0]
        assert steps["num_finished_reqs"].tolist() == [1] * 10 + [0, 0]
        assert session.summary().num_finished_reqs is None


def test_a_run_within_its_budget_stays_at_level_full(said: Any, monkeypatch: pytest.MonkeyPatch):
    now = 0

    def passes(ns: int) -> int:
        nonlocal now
        now += ns
        return now

    monkeypatch.setattr(hooks, "clock", lambda: passes(100))
    monkeypatch.setattr(wrappers, "clock", lambda: passes(100))
    with kvhook.install(max_overhead=1.0) as session:
        engine = begin(SYNC, script=script(2000))
        get_output = engine.engine_core.get_output
        engine.engine_core.get_output = lambda: (passes(1_000_000), get_output())[1]  # each step takes a millisecond
        go(engine)
        assert set(session.steps()["level"].tolist()) == {0}
        assert session.meta["engines"][0]["levels"] == [{"step": 0, "level": "full"}]
        assert session.meta["engines"][0]["max_overhead"] == 1.0
    assert said() == []


def test_as_it_is_set_it_steps_down_after_three_windows_of_256_steps():
    session, _ = over_budget(800)
    steps = session.steps()
    assert cost.WINDOW * cost.WINDOWS * 8 == 768
    # the 96th sample is taken after step 8 * 95
    assert steps["level"].tolist() == [0] * 761 + [1] * 39


def test_what_counting_takes_is_shared_by_the_steps_in_which_nothing_is_counted(monkeypatch: pytest.MonkeyPatch):
    now = 0

    def passes(ns: int) -> int:
        nonlocal now
        now += ns
        return now

    monkeypatch.setattr(taps, "clock", lambda: passes(1))
    monkeypatch.setattr(taps, "make_counter", lambda: lambda outputs, states, counts: passes(64_000))
    outputs = SimpleNamespace(outputs=["one"], scheduler_stats=None)
    spent: dict[int, list[int]] = {}
    for every in (1, 4, 16):
        client = SimpleNamespace(get_output=lambda: outputs)
        processor = SimpleNamespace(request_states={}, process_outputs=None)
        engine = SimpleNamespace(engine_core=client, output_processor=processor)
        told = spent.setdefault(every, [])
        adapter = BY_LEVEL["light"][0]
        functions = SimpleNamespace(record=print, take=lambda *given, told=told: told.append(given[3]))
        taps.tap_core(Tap(engine, adapter, functions, {}, print, every))
        for _ in range(10):
            client.get_output()
    # the first step is timed, and the ninth; each is told with the next
    assert [round(spent[every][1], -3) for every in (1, 4, 16)] == [64_000, 16_000, 4_000]
    assert [spent[every][9] // 1000 for every in (1, 4, 16)] == [64, 16, 4]


def test_a_fault_in_what_was_put_into_an_engine_that_was_let_go_of_does_not_bring_it_back():
    with kvhook.install(level="light"):
        engine = begin(SYNC, script=script(2))
        ours = engine.engine_core.get_output
        del engine.output_processor.request_states
        kvhook.uninstall()
        ours()  # somebody has kept it
        assert not hooks.is_recorded(engine)


@pytest.mark.usefixtures("hasty")
def test_two_engines_step_down_each_by_itself():
    with kvhook.install(max_overhead=1e-9) as session:
        one, two = begin(SYNC, script=script(20)), begin(SYNC, script=script(20))
        go(one, 20), go(two, 2)
        assert set(session.steps(0)["level"].tolist()) == {0, 1, 2}
        assert session.steps(1)["level"].tolist() == [0, 1]
        assert [len(e["levels"]) for e in session.meta["engines"]] == [4, 2]
        assert session.faults == {}


# An engine that cannot step down


@pytest.mark.usefixtures("hasty")
def test_where_it_cannot_be_done_it_is_said_once_and_the_level_stays(monkeypatch: pytest.MonkeyPatch, said: Any):
    monkeypatch.setattr(hooks, "step_down", lambda *_: False)
    session, _ = over_budget()
    assert set(session.steps()["level"].tolist()) == {0}
    assert session.steps()["num_generation_tokens"].tolist() == [i + 2 for i in range(STEPS)]
    first, told = session.meta["engines"][0]["levels"]
    assert first == {"step": 0, "level": "full"}
    assert told["level"] == "full"
    assert "this engine cannot be recorded for less" in told["why"]
    (text,) = said()
    assert "cannot be recorded for less" in text


@pytest.mark.usefixtures("hasty")
def test_an_error_on_the_way_down_is_a_fault_and_the_level_stays(monkeypatch: pytest.MonkeyPatch, said: Any):
    def fail(*_: Any) -> bool:
        raise LookupError("no such class")

    monkeypatch.setattr(hooks, "step_down", fail)
    session, _ = over_budget()
    assert session.faults == {"stepping down to a level that costs less": 1}
    assert session.steps()["num_generation_tokens"].tolist() == [i + 2 for i in range(STEPS)]
    assert session.meta["engines"][0]["levels"] == [{"step": 0, "level": "full"}]
    (text,) = said()
    assert "the level stays as it is" in text


@pytest.mark.usefixtures("hasty")
def test_a_tap_that_cannot_be_put_in_leaves_the_engine_recorded_as_it_was(monkeypatch: pytest.MonkeyPatch):
    def fail() -> None:
        raise LookupError("no such event")

    monkeypatch.setattr("kvhook.hooks.taps.make_counter", fail)
    session, engine = over_budget()
    assert session.faults == {"stepping down to a level that costs less": 1}
    steps = session.steps()
    assert set(steps["level"].tolist()) == {0}
    assert steps["num_generation_tokens"].tolist() == [i + 2 for i in range(STEPS)]
    assert engine.log_stats is True


@pytest.mark.usefixtures("hasty")
def test_v0_has_nothing_to_leave_out_and_says_so(said: Any):
    with stubs(engines_of("0.9.2")), kvhook.install(max_overhead=1e-9) as session:
        engine = make_engine(f"{V0_ENGINE}:LLMEngine", log_stats=False)
        for _ in range(20):
            engine.plan.append([v0_stats()])
            engine.step()
        assert "max_overhead has no effect on this engine: V0 makes all its stats in one piece" in said()[0]
        assert set(session.steps()["level"].tolist()) == {0}
        assert session.steps()["num_generation_tokens"].tolist() == [4] * 20
        assert session.faults == {}


def test_on_an_event_loop_a_budget_has_no_effect_and_that_is_said(said: Any):
    with kvhook.install(max_overhead=1e-9) as session:
        go(begin(ON_LOOP, script=script(20)))
        assert set(session.steps()["level"].tolist()) == {0}
    (text,) = said()
    assert "max_overhead has no effect on this engine: on an event loop" in text
