"""Engines that kvhook did not see being made, and whose steps run all the same: they are recorded, or named."""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kvhook
from kvhook.hooks.registry import registry
from tests.conftest import Python
from tests.contracts.behaviour import make_engine
from tests.contracts.core import Prompt, Said, Sent, add
from tests.contracts.core_engines import SYNC, engines_of
from tests.contracts.loader import stubs

RELEASES = ["0.8.5", "0.13.0", "0.19.1", "0.32.0"]


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The warnings that kvhook has given so far."""
    gc.collect()  # no engine of an earlier test is alive
    return lambda: [r.getMessage() for r in caplog.records if r.name == "kvhook" and r.levelno >= logging.WARNING]


def drive(engine: Any, *names: str) -> None:
    """Each request has a prompt of ten tokens and gets one token, in one step for all."""
    for name in names:
        add(engine, name, Prompt(computed=10))
    engine.engine_core.plan.append(Sent(tuple(Said(n, finished=True) for n in names), running=0, looked_up=10))
    engine.step()


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("level", ["full", "light"])
@pytest.mark.parametrize("release", RELEASES)
def test_a_copy_is_recorded_whether_its_original_lives_or_not(
    fresh: Path, step_path: str, said: Any, release: str, level: str, stats: bool
):
    with stubs(engines_of(release)), kvhook.install(level=level, ring_slots=64) as session:
        engine = make_engine(SYNC, log_stats=stats)
        drive(engine, "a", "b")
        twin = copy.copy(engine)
        drive(twin, "c")
        drive(engine, "d", "e", "f")
        assert said() == []
        assert session.steps()["num_generation_tokens"].tolist() == [2, 1, 3]
        del engine
        gc.collect()
        drive(twin, "g")
        drive(twin, "h", "i")
        (warning,) = said()
        assert "did not see it being made" in warning
        steps = session.steps()
        assert steps["num_generation_tokens"].tolist() == [2, 1, 3, 1, 2]
        # 0.8 counts blocks
        assert steps["prefix_cache_queries"].tolist() == [160 if release == "0.8.5" else 10] * 5
        assert session.faults == {}


@pytest.mark.parametrize("stats", [False, True])
def test_an_engine_whose_init_calls_none_of_vllms_is_recorded_or_named_at_its_first_step(
    fresh: Path, step_path: str, said: Any, stats: bool
):
    with stubs(engines_of("0.32.0")):
        state = dict(vars(make_engine(SYNC, log_stats=stats)))
        base = type(make_engine(SYNC, log_stats=stats))

        class Checkpointed(base):  # type: ignore[misc, valid-type]
            def __init__(self) -> None:
                self.__dict__.update(state)

        gc.collect()
        session = kvhook.install(ring_slots=64)
        engine = Checkpointed()
        drive(engine, "a")
        drive(engine, "b", "c")
        (warning,) = said()
        assert "Checkpointed" in warning
        if stats:
            assert session.steps()["num_generation_tokens"].tolist() == [1, 2]
            assert "is recorded from its present step on" in warning
        else:
            assert len(session.steps()) == 0
            assert "are not recorded" in warning
            assert "disable_log_stats=False" in warning
        assert session.faults == {}


def test_nothing_is_looked_at_again_and_nothing_is_called_after_uninstall(
    fresh: Path, step_path: str, said: Any, monkeypatch: pytest.MonkeyPatch
):
    with stubs(engines_of("0.32.0")):
        before = make_engine(SYNC, log_stats=True)
        session = kvhook.install(ring_slots=64)
        drive(before, "a")  # named when kvhook was installed, and left alone: attach() records it
        assert len(session.steps()) == 0
        assert len(said()) == 1
        engine = make_engine(SYNC, log_stats=False)
        monkeypatch.setattr(type(session), "open_engine", lambda *_: None, raising=False)
        registry.remove(id(engine))
        registry.leave(engine)
        drive(engine, "b")
        assert len(session.steps()) == 0
        step = vars(type(engine))["step"]
        kvhook.uninstall()
        monkeypatch.setattr(registry, "owner", object())
        add(engine, "c", Prompt(computed=10))
        engine.engine_core.plan.append(Sent((Said("c", finished=True),), running=0))
        step.__get__(engine)()  # somebody holds on to the wrapper that was there
        monkeypatch.undo()
        assert registry.engines == {}


FORK = """
import os, sys
import kvhook
from tests.contracts.behaviour import make_engine
from tests.contracts.core import Prompt, Said, Sent, add
from tests.contracts.core_engines import SYNC, engines_of
from tests.contracts.loader import stubs

def drive(engine, *names):
    for name in names:
        add(engine, name, Prompt(computed=10))
    engine.engine_core.plan.append(Sent(tuple(Said(n, finished=True) for n in names), running=0, looked_up=10))
    engine.step()

with stubs(engines_of("{release}")):
    session = kvhook.install(trace="run.kvh", level="{level}")
    engine = make_engine(SYNC, log_stats={stats})
    drive(engine, "a", "b")
    child = os.fork()
    if not child:
        drive(engine, "c")
        drive(engine, "d", "e", "f")
        assert session.steps()["num_generation_tokens"].tolist() == [1, 3], session.steps()
        assert session.faults == {{}}, session.faults
        sys.exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    drive(engine, "g")
    assert session.faults == {{}}, session.faults
    print(child)
"""


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize(("release", "level"), [("0.32.0", "full"), ("0.32.0", "light"), ("0.13.0", "full")])
def test_a_parents_engine_that_a_forked_child_drives_is_recorded_into_a_file_of_the_child(
    release: str, level: str, stats: bool, step_path: str, tmp_path: Path, python: Python
):
    done = python(FORK.format(release=release, level=level, stats=stats))
    child = done.stdout.split()[0]
    assert "did not see it being made" in done.stderr
    tokens = {path.name: kvhook.open(path).steps()["num_generation_tokens"].tolist() for path in tmp_path.glob("*.kvh")}
    assert tokens == {"run.kvh": [2, 1], f"run-pid{child}.kvh": [1, 3]}
