"""A session at level light, and one that steps down: ring, trace, summary and exports say what they hold."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import kvhook
from kvhook import VLLMMetricsCollector, hooks
from kvhook.adapters import BY_LEVEL
from kvhook.cli import main
from kvhook.hooks import taps, wrappers
from kvhook.hooks.tap import Tap
from kvhook.recording import budget as cost
from kvhook.schema import COUNTED, FULL_ONLY
from tests.contracts.behaviour import V0_ENGINE, make_engine
from tests.contracts.core import Prompt, Said, Sent, add
from tests.contracts.core_engines import ON_LOOP, SYNC, engines_of
from tests.contracts.light.script import begin, go
from tests.contracts.loader import stubs
from tests.contracts.made_stats import v0_stats

pytestmark = pytest.mark.usefixtures("fresh")

#: Every eighth step is measured, from the first one on: with windows of one sample these steps are the last of a level.
CHANGES = {1: ("light", 1), 9: ("sparse", 4), 17: ("sparse", 16), 25: ("sparse", 64)}
STEPS = 40
#: Steps whose outputs are counted, worked out by hand: 9 and 13 of every fourth, 17 of every 16th, 25 of every 64th.
COUNTED_STEPS = {*range(9), 9, 13, 17, 25}


@pytest.fixture(autouse=True)
def vllm() -> Iterator[None]:
    with stubs(engines_of("0.32.0")):
        yield


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The warnings that kvhook has given so far."""
    return lambda: [r.getMessage() for r in caplog.records if r.name == "kvhook" and r.levelno >= logging.WARNING]


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sample over the budget is enough to step down."""
    monkeypatch.setattr(cost, "WINDOW", 1)
    monkeypatch.setattr(cost, "WINDOWS", 1)


def script(steps: int) -> tuple[Sent, ...]:
    """Two requests; the first step brings their prompts, step i brings i + 2 tokens."""
    return tuple(Sent((Said("a", tokens=1 + i), Said("b")), running=2 + i) for i in range(steps))


def over_budget(steps: int = STEPS, *, log_stats: bool = False, **install: Any) -> tuple[kvhook.Session, Any]:
    """An engine that took some steps under a budget that nothing can keep to."""
    session = kvhook.install(max_overhead=1e-9, **install)
    engine = begin(SYNC, script=script(steps), log_stats=log_stats)
    go(engine)
    return session, engine


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


# What the trace tells of it


def check_levels(meta: dict[str, Any]) -> None:
    (engine,) = meta["engines"]
    first, *changes = engine["levels"]
    assert first == {"step": 0, "level": "full"}
    assert {c["step"]: (c["level"], c["every"]) for c in changes} == CHANGES
    for change in changes:
        assert change["share"] > 1e-9
        assert change["why"] == f"kvhook took {change['share']:.2%} of the time inside steps, 0.00% are allowed"
    assert engine["max_overhead"] == 1e-9


@pytest.mark.usefixtures("hasty")
def test_the_session_and_its_trace_tell_step_level_every_share_and_why(fresh: Path, said: Any):
    session, _ = over_budget(trace=fresh / "run.kvh")
    check_levels(session.meta)
    kvhook.uninstall()
    check_levels(session.meta)
    check_levels(kvhook.open(fresh / "run.kvh").meta)
    assert ["from step 1 on the level is light" in text for text in said()] == [True, False, False, False]
    assert all("max_overhead" in text or "are allowed" in text for text in said())


@pytest.mark.usefixtures("hasty")
def test_uninstalled_at_once_the_file_has_it_too(fresh: Path):
    session, _ = over_budget(1, trace=fresh / "run.kvh")
    kvhook.uninstall()
    trace = kvhook.open(fresh / "run.kvh")
    assert len(trace.steps()) == 1
    assert [c["level"] for c in trace.meta["engines"][0]["levels"]] == ["full", "light"]
    assert trace.summary().level_changes == session.summary().level_changes != []


@pytest.mark.usefixtures("hasty")
def test_read_right_after_the_step_it_is_there():
    session, _ = over_budget(1)
    assert [c["level"] for c in session.meta["engines"][0]["levels"]] == ["full", "light"]
    assert "step 1: light, because" in str(session.summary())


@pytest.mark.usefixtures("hasty")
def test_it_is_there_also_if_the_step_was_drained_before_it_was_told(monkeypatch: pytest.MonkeyPatch):
    step_down = hooks.step_down

    def drained_meanwhile(*given: Any) -> bool:
        assert len(kvhook.install().steps()) == 1
        return step_down(*given)

    monkeypatch.setattr(hooks, "step_down", drained_meanwhile)
    session, _ = over_budget(1)
    assert [c["level"] for c in session.meta["engines"][0]["levels"]] == ["full", "light"]


@pytest.mark.usefixtures("hasty")
def test_an_engine_that_is_deleted_after_it_has_told_it():
    session, engine = over_budget(3)
    del engine
    assert [c["level"] for c in session.meta["engines"][0]["levels"]] == ["full", "light"]


@pytest.mark.usefixtures("hasty")
def test_a_bounded_history_that_has_dropped_the_change_still_tells_it():
    session, _ = over_budget(6000, history="1MB")
    assert session.meta["records_dropped"] > 0
    check_levels(session.meta)


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


# The summary


def test_a_light_run_says_that_it_is_one_and_what_it_lacks():
    with kvhook.install(level="light") as session:
        go(begin(SYNC, script=script(10)))
        s = session.summary()
    assert s.steps_by_level == {"light": 10}
    assert s.level_changes == []
    assert (s.num_generation_tokens, s.num_finished_reqs) == (sum(i + 2 for i in range(10)), 0)
    assert s.time_to_first_token.count == 0
    assert {"time_to_first_token", "inter_token_latency", "e2e_latency", "finished_by_reason"} <= s.not_recorded.keys()
    assert "num_generation_tokens" not in s.not_recorded
    text = str(s)
    assert "level           light: no latencies, no single requests" in text
    assert "latency         not recorded at level light: kvhook.install(level='full') does" in text
    assert "first token" not in text
    assert "generated       65 tokens" in text
    assert max(map(len, text.splitlines())) <= 100
    json.dumps(s.as_dict())


def test_a_full_run_says_nothing_of_levels():
    with kvhook.install() as session:
        go(begin(SYNC, script=script(10)))
        s = session.summary()
    assert (s.steps_by_level, s.level_changes, s.not_recorded) == ({"full": 10}, [], {})
    assert "level" not in str(s)


@pytest.mark.usefixtures("hasty")
def test_a_run_that_went_down_to_light_has_exact_tokens_and_the_latencies_of_its_full_steps():
    session, _ = over_budget(9)
    s = session.summary()
    assert s.steps_by_level == {"full": 1, "light": 8}
    assert s.num_generation_tokens == sum(i + 2 for i in range(9))
    assert s.num_prompt_tokens == 50
    assert s.time_to_first_token.count == 2
    assert "of 1 of 9 steps only" in s.not_recorded["time_to_first_token"]
    assert "num_generation_tokens" not in s.not_recorded
    text = str(s)
    assert "full in 1 steps, light in 8 steps" in text
    assert "latencies and single requests are those of the 1 steps at level full" in text
    assert "step 1: light, because kvhook took" in text
    assert "first token             2" in text


@pytest.mark.usefixtures("hasty")
def test_totals_of_a_run_that_was_counted_in_part_are_none_with_a_reason():
    session, _ = over_budget()
    s = session.summary()
    assert s.steps_by_level == {"full": 1, "light": 8, "sparse": 31}
    none = {*COUNTED, "prompt_tokens_per_second", "generation_tokens_per_second"}
    assert len(none & s.as_dict().keys()) == 8
    for name in none & s.as_dict().keys():
        assert getattr(s, name) is None, name
        assert "to stay within max_overhead" in s.not_recorded[name]
    assert s.num_running_reqs_peak == 2 + STEPS - 1
    assert [c["step"] for c in s.level_changes] == list(CHANGES)
    text = str(s)
    assert "tokens are not known: in some steps outputs were not counted" in text
    assert "prompt tokens   not known" in text
    assert "generated       not known" in text
    assert "preemptions     not known" in text
    assert "finished        not known" in text
    assert "step 25: sparse, because" in text
    plain = json.loads(json.dumps(s.as_dict()))
    assert plain["num_generation_tokens"] is None


# Columns and reasons


def test_a_light_session_gives_no_reason_for_what_it_has_and_no_false_hope():
    with kvhook.install(level="light") as session:
        go(begin(SYNC, script=script(3)))
        absent, names = session.meta["absent"], set(session.steps().dtype.names or ())
        whys = session.meta["engines"][0]["absent"]["step"]
    assert not names & absent.keys()
    assert "level='light'" in absent["ttft_count"]
    # what no level has in this vLLM says so
    assert whys["num_swapped_reqs"] == "vLLM's v1 engine has no such number"
    assert "level" not in whys["cpu_kv_cache_usage"]


# Exports


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_exports_leave_out_what_was_not_recorded(fresh: Path, suffix: str):
    session, _ = over_budget()
    session.dump(fresh / f"run{suffix}")
    text = (fresh / f"run{suffix}").read_text()
    if suffix == ".csv":
        rows: list[Any] = list(csv.DictReader(text.splitlines()))
        unknown: Any = ""
    else:
        rows = [row for row in map(json.loads, text.splitlines()) if row["kind"] == "step"]
        unknown = None
    assert len(rows) == STEPS
    full_only = set(FULL_ONLY) & rows[0].keys()
    counted = set(COUNTED) & rows[0].keys()
    assert {"ttft_count", "itl_sum", "num_corrupted_reqs"} <= full_only
    assert {"num_generation_tokens", "num_finished_reqs", "num_prompt_tokens_external"} <= counted
    for i, row in enumerate(rows):
        if i:  # the first is at level full
            assert {row[name] for name in full_only} == {unknown}, i
        if i in COUNTED_STEPS:
            assert int(row["num_generation_tokens"]) == i + 2
            assert unknown not in {row[name] for name in counted}, i
        else:
            assert {row[name] for name in counted} == {unknown}, i
        assert int(row["num_running_reqs"]) == 2 + i
    assert int(rows[0]["ttft_count"]) == 2


@pytest.mark.usefixtures("hasty")
def test_a_dumped_trace_is_the_same_run(fresh: Path):
    session, _ = over_budget()
    session.dump(fresh / "run.kvh")
    again = kvhook.open(fresh / "run.kvh")
    check_levels(again.meta)
    assert again.steps().tolist() == session.steps().tolist()
    assert str(again.summary()) == str(session.summary())


# The collector


@pytest.mark.usefixtures("hasty")
def test_the_collector_gives_no_total_of_what_was_counted_in_part():
    session, engine = over_budget(13)
    got = VLLMMetricsCollector(engine).get_comprehensive_stats()
    for name in ("num_generation_tokens", "num_prompt_tokens", "num_preempted_reqs", "num_finished_reqs"):
        assert got["key_metrics"][name] is None, name
        assert "to stay within max_overhead" in got["absent"][name]
        assert got["summary"][name] is None
    assert got["key_metrics"]["num_running_reqs"] == 2 + 12
    assert "num_generation_tokens" not in session.meta["absent"]


@pytest.mark.usefixtures("hasty")
def test_the_collector_gives_totals_as_long_as_every_step_is_counted():
    # at sparse the first step is counted, and here it is the last
    _, engine = over_budget(10)
    got = VLLMMetricsCollector(engine).get_comprehensive_stats()
    assert got["key_metrics"]["num_generation_tokens"] == sum(i + 2 for i in range(10))
    assert got["key_metrics"]["num_prompt_tokens"] == 50
    assert got["summary"]["num_generation_tokens"] == sum(i + 2 for i in range(10))


def test_the_collector_at_level_light_has_tokens_and_no_latencies():
    with kvhook.install(level="light"):
        engine = begin(SYNC, script=script(10))
        go(engine)
        got = VLLMMetricsCollector(engine).get_comprehensive_stats()
    assert got["collection_method"] == "hook"
    assert got["key_metrics"]["num_generation_tokens"] == sum(i + 2 for i in range(10))
    assert got["key_metrics"]["num_prompt_tokens"] == 50
    assert not {"num_generation_tokens", "num_prompt_tokens"} & got["absent"].keys()
    assert got["histogram_analysis"]["avg_time_to_first_token_seconds"] is None


# The command line


def record(path: Path, steps: int = 9, **install: Any) -> Path:
    kvhook.uninstall()
    with kvhook.install(trace=path, **install):
        go(begin(SYNC, script=script(steps)))
    return path


@pytest.mark.usefixtures("hasty")
def test_full_light_and_sparse_side_by_side(fresh: Path, capsys: pytest.CaptureFixture[str]):
    full, light = record(fresh / "full.kvh"), record(fresh / "light.kvh", level="light")
    sparse = record(fresh / "sparse.kvh", 20, max_overhead=1e-9)
    assert main(["summary", str(full), str(light), str(sparse)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["full", "light", "sparse"]
    cells = {line[:28].strip(): line[28:].split("  ") for line in lines[1:]}
    row = {name: [cell.strip() for cell in some if cell.strip()] for name, some in cells.items()}
    assert row["generated tokens"] == ["54", "54", "-"]
    assert row["prompt tokens"] == ["50", "50", "-"]
    assert row["prompt tokens computed"] == ["34", "34", "-"]
    assert row["running peak"] == ["10", "10", "21"]
    assert row["time to first token p50"][1] == "-"
    assert row["time to first token p50"][0] == row["time to first token p50"][2] == "100 ms"
    both = kvhook.open(full, light)
    assert both.steps(0)["num_generation_tokens"].tolist() == both.steps(1)["num_generation_tokens"].tolist()
    assert both.summary().steps_by_level == {"full": 9, "light": 9}
    assert "ttft_count" not in both.meta["absent"]


def test_light_traces_go_through_every_verb(fresh: Path, capsys: pytest.CaptureFixture[str]):
    with kvhook.install(level="light", trace=fresh / "light.kvh") as session:
        go(begin(SYNC, script=script(20)))
        (ring,) = session.rings
    for verb in (["tail", ring], ["autopsy", ring], ["summary", ring], ["summary", "--json", fresh / "light.kvh"]):
        assert main(list(map(str, verb))) == 0, verb
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err
    for name in ("out.csv", "out.jsonl"):
        assert main(["export", str(fresh / "light.kvh"), str(fresh / name)]) == 0


# Arguments


@pytest.mark.parametrize("level", ["x", "", "Full", None, 1, "sparse"])
def test_a_level_that_there_is_not_is_refused(level: Any):
    with pytest.raises(kvhook.KvhookError, match=r"level=.*'full', 'light'"):
        kvhook.install(level=level)
    with kvhook.install() as session:
        assert session.level == "full"


@pytest.mark.parametrize("share", [0, 2, "a", True, False, -0.1, 1.0001, float("nan"), float("inf"), [0.01]])
def test_a_budget_that_is_no_share_is_refused(share: Any):
    with pytest.raises(kvhook.KvhookError, match="max_overhead is a share of the step time"):
        kvhook.install(max_overhead=share)
    with kvhook.install() as session:
        assert "recording" in repr(session)


@pytest.mark.parametrize("share", [1, 0.01, 1e-12])
def test_a_share_is_taken(share: float):
    with kvhook.install(max_overhead=share) as session:
        go(begin(SYNC, script=script(1)))
        assert session.meta["engines"][0]["max_overhead"] == share
        assert session.faults == {}


def test_installing_again_with_another_level_or_budget_warns_that_it_has_no_effect(said: Any):
    session = kvhook.install(max_overhead=0.5)
    assert kvhook.install() is kvhook.install(max_overhead=0.5) is kvhook.install(level="full") is session
    assert said() == []
    assert kvhook.install(level="light", max_overhead=0.1) is session
    level, budget = said()
    assert "level='light' has no effect" in level
    assert "max_overhead=0.1 has no effect" in budget
    assert all("kvhook.uninstall() first" in text for text in said())
    assert session.level == "full"


def test_after_uninstall_the_level_can_be_another():
    for level, code in (("light", 1), ("full", 0), ("light", 1)):
        with kvhook.install(level=level) as session:
            go(begin(SYNC, script=script(2)))
            assert session.steps()["level"].tolist() == [code] * 2
            assert session.faults == {}
