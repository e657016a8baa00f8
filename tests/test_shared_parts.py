"""Engines that share their parts, or get others while they are recorded: nothing is lost or counted twice."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kvhook
from kvhook.analysis.queue import Queue
from tests.conftest import Python
from tests.contracts.behaviour import make_engine
from tests.contracts.core import Prompt, Said, Sent, add
from tests.contracts.core_engines import SYNC, engines_of
from tests.contracts.loader import stubs
from tests.test_unseen_engines import drive

RELEASES = ["0.8.5", "0.13.0", "0.19.1", "0.32.0"]
LEVELS = pytest.mark.parametrize("level", ["full", "light"])
STATS = pytest.mark.parametrize("stats", [False, True], ids=["stats off", "stats on"])


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The warnings that kvhook has given so far."""
    gc.collect()  # no engine of an earlier test is alive
    return lambda: [r.getMessage() for r in caplog.records if r.name == "kvhook" and r.levelno >= logging.WARNING]


def generated(session: kvhook.Session) -> list[int]:
    tokens: list[int] = session.steps()["num_generation_tokens"].tolist()
    return tokens


# Copies


@LEVELS
@STATS
def test_attaching_a_copy_of_what_is_recorded_counts_nothing_twice(
    fresh: Path, step_path: str, said: Any, level: str, stats: bool
):
    with stubs(engines_of("0.32.0")), kvhook.install(level=level, ring_slots=64) as session:
        engine = make_engine(SYNC, log_stats=stats)
        drive(engine, "a")
        twin = copy.copy(engine)
        assert kvhook.attach(twin) is session
        drive(twin, "b", "c")
        drive(engine, "d")
        assert generated(session) == [1, 2, 1]
        assert session.steps()["num_finished_reqs"].tolist() == [1, 2, 1]
        assert session.steps()["num_added_reqs"].tolist() == [1, 2, 1]
        assert (said(), session.faults) == ([], {})


@LEVELS
def test_uninstall_leaves_the_stats_of_copies_as_the_user_wanted_them(fresh: Path, step_path: str, level: str):
    """vLLM's step fails if an engine makes stats and its output processor gives requests no clocks."""
    with stubs(engines_of("0.32.0")):
        kvhook.install(level=level, ring_slots=64)
        engine = make_engine(SYNC, log_stats=False)
        drive(engine, "a")
        twin, never_driven = copy.copy(engine), copy.copy(engine)
        drive(twin, "b")
        kvhook.uninstall()
        for each in (engine, twin, never_driven):
            assert each.log_stats is False
            assert each.output_processor.log_stats is False
            drive(each, "c")


def test_an_engine_that_gets_the_id_of_one_that_is_gone_is_not_taken_for_it(fresh: Path, step_path: str):
    with stubs(engines_of("0.32.0")), kvhook.install(ring_slots=64) as session:
        engine = make_engine(SYNC, log_stats=False)
        drive(engine, "a", "b")
        twin, was = copy.copy(engine), id(engine)
        del engine
        gc.collect()
        kind: Any = type(twin)
        empty = {id(each): each for each in (kind.__new__(kind) for _ in range(5000))}
        other = empty.get(was)
        if other is None:
            pytest.skip("no object got the id of the engine that is gone")
        kind.__init__(other, vllm_config=twin.vllm_config, executor_class=None, log_stats=False)
        drive(twin, "c", "d", "e")
        drive(other, "f")
        steps = session.steps()
        assert steps["num_generation_tokens"].tolist().count(0) == 0
        assert sorted(steps["num_generation_tokens"].tolist()) == [1, 2, 3]


# Parts that are exchanged while an engine is recorded


class Client:
    """Has outputs of its own; otherwise it is vLLM's client. It cannot be hashed."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, client: Any) -> None:
        self.client = client
        self.plan = client.plan

    def get_output(self) -> Any:
        return type(self.client).get_output(self.client)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)


@LEVELS
@STATS
@pytest.mark.parametrize("release", RELEASES)
def test_a_client_that_is_exchanged_between_two_runs_is_tapped_before_its_first_request(
    fresh: Path, step_path: str, said: Any, release: str, level: str, stats: bool
):
    with stubs(engines_of(release)), kvhook.install(level=level, ring_slots=64) as session:
        engine = make_engine(SYNC, log_stats=stats)
        drive(engine, "a")
        engine.engine_core = Client(engine.engine_core)
        drive(engine, "b", "c")
        drive(engine, "d")
        assert generated(session) == [1, 2, 1]
        assert session.steps()["has_scheduler_stats"].tolist() == [1, 1, 1]
        assert session.steps()["num_finished_reqs"].tolist() == [1, 2, 1]
        assert (said(), session.faults) == ([], {})


@LEVELS
def test_an_engine_dies_with_its_last_reference_though_an_output_processor_was_made(
    fresh: Path, step_path: str, level: str
):
    """A processor that somebody makes may be for any engine that is recorded: each is looked at again."""
    with stubs(engines_of("0.32.0")), kvhook.install(level=level, ring_slots=64):
        engine = make_engine(SYNC, log_stats=False)
        drive(engine, "a")
        processor = type(engine.output_processor)(log_stats=True)
        assert "add_request" in vars(engine)
        gone = weakref.ref(engine)
        gc.collect()
        gc.disable()  # no circle keeps it
        try:
            del engine
            assert gone() is None
        finally:
            gc.enable()
        assert processor is not None


@pytest.mark.parametrize("release", ["0.13.0", "0.32.0"])
def test_an_output_processor_whose_stats_are_turned_off_does_not_make_vllms_step_fail(
    fresh: Path, step_path: str, release: str
):
    """It changes nothing without kvhook: they were off. With kvhook they are on, for kvhook alone."""
    with stubs(engines_of(release)), kvhook.install(ring_slots=64) as session:
        engine = make_engine(SYNC, log_stats=False)
        drive(engine, "a")
        engine.output_processor.log_stats = False
        drive(engine, "b", "c")
        drive(engine, "d")
        assert generated(session) == [1, 2, 1]
        assert session.faults == {}


# Loops of somebody's own


@LEVELS
@pytest.mark.parametrize("handed", [list, iter, lambda outputs: outputs], ids=["a copy", "an iterator", "the list"])
@pytest.mark.parametrize("late", [False, True], ids=["at once", "one step late"])
@pytest.mark.parametrize("release", RELEASES)
def test_finished_requests_of_a_loop_are_counted_in_their_steps(
    fresh: Path, step_path: str, release: str, level: str, late: bool, handed: Callable[[Any], Any]
):
    if late and handed is iter and level == "full":
        pytest.skip("nothing tells which step the outputs are of that an iterator gave")
    with stubs(engines_of(release)), kvhook.install(level=level, ring_slots=64) as session:
        engine = make_engine(SYNC, log_stats=False)
        waiting: list[Any] = []
        for names in ("ab", "cdf", "ghij", "k"):
            for name in names:
                add(engine, name, Prompt(computed=10))
            outputs = Sent(tuple(Said(name, finished=True) for name in names), running=0, looked_up=10)
            engine.engine_core.plan.append(outputs)
            waiting.append(engine.engine_core.get_output())
            if len(waiting) > late:
                engine.output_processor.process_outputs(handed(waiting.pop(0).outputs))
        for left in waiting:
            engine.output_processor.process_outputs(handed(left.outputs))
        steps = session.steps()
        assert steps["num_generation_tokens"].tolist() == [2, 3, 4, 1]
        finished = steps["num_finished_reqs"].tolist()
        assert sum(finished) == 10
        assert min(finished) >= 0
        if not late or level == "full":
            assert finished == [2, 3, 4, 1]
        assert session.faults == {}


def test_no_number_of_requests_in_a_queue_is_negative():
    assert Queue(before=0, added=1, finished=4, aborted=0, at_end=0, late=4).left == 0
    assert Queue(before=3, added=1, finished=2, aborted=0, at_end=3, late=1).left == 2


# Forked children

FORK = """
import copy, os, sys
import kvhook
from tests.contracts.behaviour import make_engine
from tests.contracts.core import Prompt
from tests.contracts.core_engines import SYNC, engines_of
from tests.contracts.loader import stubs
from tests.test_unseen_engines import drive

with stubs(engines_of("0.32.0")):
    session = kvhook.install(trace="run.kvh", level="{level}")
    engine = make_engine(SYNC, log_stats=False)
    drive(engine, "a", "b")
    twin = copy.copy(engine)
    child = os.fork()
    if not child:
        {child}
        sys.exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    drive(engine, "g")
    assert session.faults == {{}}, session.faults
    assert session.steps()["num_generation_tokens"].tolist() == [2, 1], session.steps()
"""


@LEVELS
def test_in_a_forked_child_a_copy_may_be_driven_first(step_path: str, level: str, python: Python):
    child = (
        "drive(twin, 'c'); drive(engine, 'd', 'e'); drive(twin, 'f');"
        "tokens = session.steps()['num_generation_tokens'].tolist();"
        "assert tokens == [1, 2, 1], tokens; assert session.faults == {}, session.faults"
    )
    assert "turned off" not in python(FORK.format(level=level, child=child)).stderr


@LEVELS
def test_uninstall_in_a_forked_child_leaves_the_parents_engine_as_it_was(step_path: str, level: str, python: Python):
    child = (
        "kvhook.uninstall();"
        "parts = (engine, engine.engine_core, engine.output_processor);"
        "left = [n for part in parts for n in ('get_output', 'add_request', 'process_outputs') if n in vars(part)];"
        "assert left == [], left; assert not engine.log_stats; assert not engine.output_processor.log_stats;"
        "assert not twin.log_stats; drive(engine, 'x'); drive(twin, 'y')"
    )
    assert "__init__" not in python(FORK.format(level=level, child=child)).stderr
