"""Scopes: what a step belongs to, what a summary leaves out, what is in the file after a kill."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import kvhook
from kvhook.cli import main
from kvhook.errors import KvhookError
from tests.conftest import ROOT
from tests.standin import fake_vllm, looked_up, play

pytestmark = pytest.mark.usefixtures("fresh")


def test_a_warm_up_is_left_out_of_the_summary_which_says_so():
    with fake_vllm() as vllm, kvhook.install() as session:
        engine = vllm.engine()
        with session.scope("warm-up"):
            play(engine, *[looked_up(100, 0)] * 3)
        with session.scope("measured"):
            play(engine, *[looked_up(90, 80)] * 2)
        summary, whole = session.summary(), session.summary(warmup=True)
    assert (summary.steps, summary.prefix_cache_queries, summary.prefix_cache_hits) == (2, 180, 160)
    assert (whole.steps, whole.prefix_cache_queries, whole.prefix_cache_hits) == (5, 480, 160)
    assert summary.left_out == (3, ("warm-up",))
    assert whole.left_out is None
    assert "warm-up: 3 steps in scope 'warm-up'; summary(warmup=True) counts them" in str(summary)
    assert summary.as_dict()["left_out"] == {"steps": 3, "scopes": ["warm-up"]}


def test_the_running_summary_is_that_of_the_trace():
    with fake_vllm() as vllm, kvhook.install() as session:
        engine = vllm.engine()
        rng = random.Random(5)
        for number in range(6):
            with session.scope("warmup" if number in (0, 3) else f"part {number}"):
                for _ in range(rng.randrange(1, 5)):
                    play(engine, looked_up(rng.randrange(1, 99), rng.randrange(99), finished=rng.randrange(3)))
            assert session.summary().as_dict() == session.trace().summary().as_dict()
            assert session.summary(warmup=True).as_dict() == session.trace().summary(warmup=True).as_dict()


def test_steps_belong_to_the_scope_they_ended_in_and_to_those_around_it():
    with fake_vllm() as vllm, kvhook.install() as session:
        engine = vllm.engine()
        with session.scope("outer"):
            play(engine, looked_up(1, 0))
            with session.scope("inner"):
                play(engine, looked_up(2, 0), looked_up(3, 0))
        play(engine, looked_up(4, 0))
        with session.scope("inner"):
            play(engine, looked_up(5, 0))
        trace = session.trace()
    numbers = {path: trace.select(scope=path).steps()["prefix_cache_queries"].tolist() for path in
               ("outer", "inner", "outer/inner")}  # fmt: skip
    assert numbers == {"outer": [1, 2, 3], "inner": [2, 3, 5], "outer/inner": [2, 3]}
    assert [s.path for s in trace.scopes] == ["outer", "outer/inner", "inner"]
    assert trace.select(scope=trace.scopes[2]).steps()["step"].tolist() == [4]
    assert trace.select(scope=1).summary().prefix_cache_queries == 5
    assert str(trace.select(scope="outer/inner").summary()).splitlines()[1].split() == [
        "only",
        "scope",
        "'outer/inner'",
    ]


def test_a_scope_inside_a_warm_up_is_warm_up_and_can_be_asked_for():
    with fake_vllm() as vllm, kvhook.install() as session:
        engine = vllm.engine()
        with session.scope("cold", warmup=True), session.scope("first"):
            play(engine, looked_up(7, 0))
        with session.scope("warm-up", warmup=False):
            play(engine, looked_up(8, 8))
        assert [(s.name, s.warmup) for s in session.scopes] == [("cold", True), ("first", True), ("warm-up", False)]
        assert session.summary().prefix_cache_queries == 8
        assert session.summary(scope="first").prefix_cache_queries == 7
        assert session.summary(scope="cold").left_out is None


def test_a_run_that_is_all_warm_up_says_so():
    with fake_vllm() as vllm, kvhook.install() as session:
        with session.scope("warm-up"):
            play(vllm.engine(), looked_up(7, 0))
        text = str(session.summary())
    assert "all of them are warm-up" in text
    assert "1 step in scope 'warm-up'" in text


def test_an_unknown_scope_is_an_error_that_names_those_there_are():
    with fake_vllm() as vllm, kvhook.install() as session:
        with session.scope("measured"):
            play(vllm.engine(), looked_up(7, 0))
        with pytest.raises(KvhookError, match=r"no scope 'mesured' in this run; there are 'measured'"):
            session.summary(scope="mesured")
        with pytest.raises(KvhookError, match="this run tells no labels of requests: this vLLM's front end has"):
            session.summary(label="x")
    with fake_vllm() as vllm, kvhook.install() as session:
        play(vllm.engine(), looked_up(7, 0))
        with pytest.raises(KvhookError, match="it has no scopes"):
            session.summary(scope="A")


@pytest.mark.parametrize("name", ["", "  ", None, 3])
def test_a_scope_without_a_name_is_an_error(name: Any):
    with kvhook.install() as session, pytest.raises(KvhookError, match="a scope has a name"):
        session.scope(name)


def test_scopes_before_the_first_engine_and_of_several_engines_are_recorded(tmp_path: Path):
    with fake_vllm() as vllm, kvhook.install(trace=tmp_path / "run.kvh") as session:
        with session.scope("start"):
            one, two = vllm.engine(), vllm.engine()
            play(one, looked_up(1, 0))
            play(two, looked_up(2, 0))
        play(two, looked_up(4, 0))
    trace = kvhook.open(tmp_path / "run.kvh")
    assert [s.name for s in trace.scopes] == ["start"]
    assert trace.select(scope="start").steps()["prefix_cache_queries"].tolist() == [1, 2]
    assert trace.select(scope="start", engine=1).steps()["prefix_cache_queries"].tolist() == [2]
    assert [e["engine"] for e in trace.select(engine=1).meta["engines"]] == [1]


def test_scopes_of_two_threads_do_not_lie_in_each_other():
    with fake_vllm() as vllm, kvhook.install() as session:
        play(vllm.engine(), looked_up(1, 0))

        def other() -> None:
            with session.scope("other"):
                pass

        with session.scope("main"):
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
        assert [(s.name, s.parent) for s in session.scopes] == [("main", -1), ("other", -1)]


def test_a_scope_that_raises_ends_and_lets_the_error_out():
    with fake_vllm() as vllm, kvhook.install() as session:
        play(vllm.engine(), looked_up(1, 0))
        with pytest.raises(ZeroDivisionError), session.scope("A"):
            _ = 1 / 0
        (scope,) = session.scopes
    assert scope.ended_ns >= scope.began_ns
    assert scope.ended_unix_ns > scope.began_unix_ns > 1_600_000_000 * 10**9


def test_a_scope_of_a_closed_session_does_nothing():
    with kvhook.install() as session:
        pass
    with session.scope("late"):
        pass
    assert session.scopes == []


KILLED_IN_A_SCOPE = """
import os, signal, sys
import kvhook
from tests.standin import fake_vllm, step_stats
with fake_vllm() as vllm:
    session = kvhook.install(trace=sys.argv[1])
    engine = vllm.engine()
    with session.scope("before"):
        engine.plan += [step_stats()]
        engine.step()
    with session.scope("died in"), session.scope("here"):
        engine.plan += [step_stats(generated=3)]
        engine.step()
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_leaves_the_scope_that_was_open_in_the_file(tmp_path: Path):
    path = tmp_path / "run.kvh"
    command = [sys.executable, "-c", KILLED_IN_A_SCOPE, str(path)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    trace = kvhook.open(path)
    ended = [("before", True), ("died in", False), ("died in/here", False)]
    assert [(s.path, s.ended_ns >= 0) for s in trace.scopes] == ended
    assert "has not ended" in str(trace.scopes[-1])
    assert main(["recover", str(path)]) == 0
    assert kvhook.open(path).select(scope="here").steps()["num_generation_tokens"].tolist() == [3]
    assert main(["summary", str(path), "--scope", "here"]) == 0


def test_scopes_survive_in_a_bounded_history_and_in_an_exported_file(tmp_path: Path):
    with fake_vllm() as vllm, kvhook.install(history="400kB") as session:
        engine = vllm.engine()
        with session.scope("warm-up"):
            play(engine, looked_up(5, 0))
        with session.scope("long"):
            play(engine, *[looked_up(1, 1)] * 3000)
            session.steps()
        with session.scope("end"):
            play(engine, looked_up(9, 9))
        session.dump(tmp_path / "out.kvh")
        session.dump(tmp_path / "small.kvh", compress=True)
        assert session.meta["records_dropped"]
        for trace in (session.trace(), kvhook.open(tmp_path / "out.kvh"), kvhook.open(tmp_path / "small.kvh")):
            assert [s.name for s in trace.scopes] == ["warm-up", "long", "end"]
            assert trace.select(scope="end").steps()["prefix_cache_hits"].tolist() == [9]


def test_traces_side_by_side_keep_their_scopes_and_their_clocks(tmp_path: Path):
    for name in ("one", "two"):
        with fake_vllm() as vllm, kvhook.install(trace=tmp_path / f"{name}.kvh") as session:
            with session.scope("warm-up"):
                play(vllm.engine(), looked_up(5, 0))
            with session.scope(name):
                play(vllm.engine(), looked_up(1, 1))
    both = kvhook.open(tmp_path / "one.kvh", tmp_path / "two.kvh")
    assert [(s.name, s.engines) for s in both.scopes] == [
        ("warm-up", (0, 1)), ("one", (0, 1)), ("warm-up", (2, 3)), ("two", (2, 3)),
    ]  # fmt: skip
    assert both.summary().prefix_cache_queries == 2
    assert both.select(scope="two").steps()["engine"].tolist() == [3]


def test_parts_by_step_and_by_time():
    with fake_vllm() as vllm, kvhook.install() as session:
        engine = vllm.engine()
        play(engine, *(looked_up(n, 0) for n in range(10)))
        trace = session.trace()
    step = [s["prefix_cache_queries"].tolist() for s in
            (trace[3:5].steps(), trace[-2:].steps(), trace[:2].steps(), trace[7].steps(), trace[-1].steps(),
             trace[20:].steps(), trace[2:8][3:5].steps())]  # fmt: skip
    assert step == [[3, 4], [8, 9], [0, 1], [7], [9], [], [3, 4]]
    assert trace[3:5].summary().steps == 2
    assert trace[20:].summary().steps == 0
    steps = trace.steps()
    second = trace.between(int(steps["t_end_ns"][4]) / 1e9, int(steps["t_end_ns"][6]) / 1e9, clock="monotonic")
    # a float of seconds holds some 100 ns
    assert set(second.steps()["step"].tolist()) <= {3, 4, 5, 6, 7}
    assert 5 in second.steps()["step"]
    for bad in (slice(0, 4, 2), "A", 1.5, None):
        with pytest.raises(KvhookError, match="cut by numbers of steps"):
            _ = trace[bad]  # type: ignore[index]
    with pytest.raises(KvhookError, match="a moment is a number of seconds or a datetime"):
        trace.between("now", 4)  # type: ignore[arg-type]
    with pytest.raises(KvhookError, match="there are 'unix' and 'monotonic'"):
        trace.between(1, 4, clock="sidereal")
