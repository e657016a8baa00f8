"""Whoever installed kvhook gets records of an engine, or is told why not: engines of other kinds, and from before."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kvhook
from tests.contracts.behaviour import ENGINE, PROCESSOR, config_of, make_engine
from tests.contracts.core import Prompt, Said, Sent, add
from tests.contracts.core_engines import ON_LOOP, SYNC, engines_of
from tests.contracts.loader import stubs
from tests.standin import fake_vllm


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The warnings that kvhook has given so far."""
    gc.collect()  # no engine of an earlier test is alive
    return lambda: [r.getMessage() for r in caplog.records if r.name == "kvhook" and r.levelno >= logging.WARNING]


# Engines that cannot be recorded


@pytest.mark.parametrize("path", [SYNC, ON_LOOP])
def test_a_subclass_that_builds_itself_is_named(fresh: Path, said: Any, path: str):
    """Its __init__ calls nothing of vLLM's: there is no place where kvhook could see it."""
    modules = engines_of("0.32.0")
    module, _, name = path.partition(":")
    with stubs(modules):
        session = kvhook.install(ring_slots=64)
        proxy = type("CheckpointableEngine", (vars(modules[module])[name],), {"__init__": lambda self: None})()
        text = str(session.summary())
        assert "CheckpointableEngine" in text
        assert "before LLM(" not in text
        kvhook.uninstall()
        del proxy
    (warning,) = [text for text in said() if "nothing was recorded" in text]
    assert "CheckpointableEngine" in warning


def test_of_an_engine_that_vllm_could_not_make_nothing_is_said(fresh: Path, said: Any):
    """Its error is the program's; what is left of it lives on in the traceback."""
    kept: list[Any] = []
    with fake_vllm() as vllm:
        config = vllm.engine().vllm_config
        kvhook.install(ring_slots=64)
        base: Any = sys.modules[ENGINE].LLMEngine

        class Broken(base):  # type: ignore[misc]
            def __setattr__(self, name: str, value: Any) -> None:
                kept.append(self)
                raise RuntimeError("no memory for KV blocks")

        with pytest.raises(RuntimeError, match="no memory"):
            Broken(config, object, log_stats=False)
        assert kept
        kvhook.uninstall()
    assert said() == []


def test_a_front_end_of_somebodys_own_is_named_and_where_it_was_made(fresh: Path, said: Any):
    """As vllm-omni does: an output processor and a client, and no engine."""
    modules = engines_of("0.32.0")
    with stubs(modules), kvhook.install(ring_slots=64) as session:
        for _ in range(2):
            vars(modules[PROCESSOR])["OutputProcessor"](True)
        (warning,) = said()  # each place once
        assert "neither vLLM's LLMEngine nor its AsyncLLM" in warning
        assert __name__ in warning
        assert __name__ in str(session.summary())
        assert "before LLM(" not in str(session.summary())


@pytest.mark.parametrize("path", [SYNC, ON_LOOP])
@pytest.mark.parametrize("release", ["0.8.5", "0.10.2", "0.32.0"])
def test_vllms_own_engines_are_not_taken_for_unknown_ones(fresh: Path, said: Any, release: str, path: str):
    with stubs(engines_of(release)), kvhook.install(ring_slots=64):
        make_engine(path, log_stats=False)
        assert said() == []


def test_an_engine_from_before_is_named_and_can_be_attached(fresh: Path, said: Any):
    with stubs(engines_of("0.32.0")):
        engine = make_engine(SYNC, log_stats=True)
        session = kvhook.install(ring_slots=64)
        (warning,) = said()
        assert "LLMEngine" in warning
        assert "kvhook.attach(llm)" in warning
        assert "kvhook.attach(llm)" in str(session.summary())
        add(engine, "a", Prompt(computed=10))
        engine.engine_core.plan += [Sent((Said("a", finished=True),), running=0)]
        assert kvhook.attach(engine) is session
        engine.step()
        assert session.summary().num_generation_tokens == 1
        assert session.faults == {}


def test_an_engine_that_is_made_after_install_is_never_told_to_be_made_after_it(fresh: Path, said: Any):
    with stubs(engines_of("0.32.0")), kvhook.install(ring_slots=64) as session:
        engine = make_engine(SYNC, log_stats=False)
        assert "call llm.generate" in str(session.summary())
        add(engine, "a", Prompt(computed=10))
        assert "1 requests were added" in str(session.summary())
        assert said() == []


@pytest.mark.parametrize("release", ["0.9.2", "0.19.1", "0.32.0"])
def test_requests_that_were_in_the_queue_before_are_said(fresh: Path, release: str):
    with stubs(engines_of(release)):
        engine = make_engine(SYNC, log_stats=True)
        for name in "abc":
            add(engine, name, Prompt(computed=10))
        engine.engine_core.plan += [Sent((Said("a"), Said("b"), Said("c")), running=3)]
        engine.step()
        session = kvhook.attach(engine)
        add(engine, "d", Prompt(computed=10))
        engine.engine_core.plan += [
            Sent((Said("a"), Said("b"), Said("c", finished=True), Said("d")), running=3),
            Sent((Said("a", finished=True), Said("b", finished=True), Said("d", finished=True)), running=0),
        ]
        engine.step()
        engine.step()
        summary = session.summary()
        assert session.faults == {}
        kvhook.uninstall()
    assert (summary.num_reqs_before, summary.num_added_reqs, summary.num_finished_reqs) == (3, 1, 4)
    assert "3 requests were in the queue before" in str(summary)


def test_a_step_that_fails_after_the_core_answered_loses_no_stats(fresh: Path):
    with stubs(engines_of("0.32.0")), kvhook.install(ring_slots=64) as session:
        engine = make_engine(SYNC, log_stats=False)
        add(engine, "a", Prompt(computed=10))
        engine.engine_core.plan += [
            Sent((Said("a"),), running=1, looked_up=10),
            Sent((Said("a"),), running=1, looked_up=7),
            Sent((Said("a", finished=True),), running=0, looked_up=1),
        ]
        engine.step()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(engine.output_processor), "_update_stats_from_output", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                engine.step()
        engine.step()
        steps = session.steps()
        assert session.faults == {}
    assert steps["prefix_cache_queries"].tolist() == [10, 7, 1]
    assert steps["has_scheduler_stats"].tolist() == [1, 1, 1]


def test_engines_of_two_kinds_in_one_process_do_not_disturb_each_other(fresh: Path):
    modules = engines_of("0.32.0")
    with stubs(modules), kvhook.install(ring_slots=64) as session:
        own = type("Own", (vars(modules[ENGINE])["LLMEngine"],), {"step": lambda self: self.engine_core.get_output()})
        engines = [make_engine(SYNC, log_stats=False), own(config_of(), object, log_stats=False)]
        for engine in engines:
            add(engine, "a", Prompt(computed=10))
            engine.engine_core.plan += [Sent((Said("a", tokens=2),), running=1)] * 3
        for _ in range(3):
            for engine in engines:
                engine.step()
        first, second = (session.steps(engine=n) for n in (0, 1))
    assert first["level"].tolist() == [0, 0, 0]
    assert second["level"].tolist() == [1, 1, 1]
    assert first["num_generation_tokens"].tolist() == second["num_generation_tokens"].tolist() == [2, 2, 2]
