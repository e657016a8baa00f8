"""Engines that are driven by another step than vLLM's own are recorded to the token, and what is lost is said."""

from __future__ import annotations

import gc
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest

import kvhook
from tests.contracts import core
from tests.contracts.behaviour import ENGINE, config_of, make_engine
from tests.contracts.core import Prompt, Said, Sent, add
from tests.contracts.core_engines import SYNC, engines_of
from tests.contracts.from_core.chunked import KINDS, looked_up, run
from tests.contracts.loader import stubs

pytestmark = pytest.mark.usefixtures("fresh")

#: three requests: one is stopped by the front end, two by the core
DRIVEN = (
    Sent((Said("a"), Said("b")), running=2, looked_up=50),
    Sent(running=2),
    Sent((Said("a", tokens=3), Said("b", preempted=1)), running=2),
    Sent((Said("a", finished=True), Said("b"), Said("c")), running=2, looked_up=7),
    Sent((Said("b", finished=True), Said("c")), running=0),
)
DRIVEN_PROMPTS = {"a": Prompt(computed=10, cached=16), "b": Prompt(computed=24), "c": Prompt(7, stop_after=2)}
TOKENS, FINISHED, PREEMPTED = [2, 0, 4, 3, 2], [0, 0, 0, 1, 2], [0, 0, 1, 0, 0]
PROMPT_TOKENS = [50, 0, 0, 7, 0]


def own_step(engine: Any) -> Any:
    """A copy of LLMEngine.step without what it does for stats."""
    outputs = engine.engine_core.get_output()
    done = engine.output_processor.process_outputs(outputs.outputs, **no_stats(engine, outputs))
    engine.engine_core.abort_requests(done.reqs_to_abort)
    return done.request_outputs


def no_stats(engine: Any, outputs: Any) -> dict[str, Any]:
    return {"engine_core_timestamp": outputs.timestamp, "iteration_stats": None}


def driven(cls: Any = None, *, log_stats: bool = False) -> Any:
    engine = make_engine(SYNC, log_stats=log_stats) if cls is None else cls(config_of(), object, log_stats=log_stats)
    for request, prompt in DRIVEN_PROMPTS.items():
        add(engine, request, prompt)
    engine.engine_core.plan += DRIVEN
    return engine


def subclass(release: str) -> Any:
    base = vars(engines_of(release)[ENGINE])["LLMEngine"]
    return type("FrameworkEngine", (base,), {"step": own_step, "__module__": "framework"})


def assert_counted(session: Any, release: str, said: Callable[[], list[str]]) -> None:
    steps, summary = session.steps(), session.summary()
    assert session.faults == {}
    assert looked_up(steps, release) == [(50, 0), (0, 0), (0, 0), (7, 0), (0, 0)]
    assert steps["num_running_reqs"].tolist() == [2, 2, 2, 2, 0]
    assert steps["num_generation_tokens"].tolist() == TOKENS
    assert steps["num_prompt_tokens"].tolist() == PROMPT_TOKENS
    assert steps["num_preempted_reqs"].tolist() == PREEMPTED
    assert steps["num_finished_reqs"].tolist() == FINISHED
    assert steps["num_added_reqs"].sum() == 3
    assert (steps["t_start_ns"] == steps["t_end_ns"]).all()
    assert (steps["level"] == 1).all()
    assert (summary.num_generation_tokens, summary.num_finished_reqs) == (sum(TOKENS), 3)
    (warning,) = [text for text in said() if "LLMEngine.step" in text]
    assert "without step times" in warning
    assert "counted from the engine core's outputs" in warning
    assert "not known" not in str(summary).split("generated")[1].splitlines()[0]
    assert "before LLM(" not in str(summary)


@pytest.mark.parametrize("log_stats", [False, True], ids=["off", "on"])
@pytest.mark.parametrize("release", KINDS)
def test_a_subclass_with_a_step_of_its_own_is_recorded_to_the_token(release: str, log_stats: bool, said: Any):
    with stubs(engines_of(release)), kvhook.install(ring_slots=64) as session:
        engine = driven(subclass(release), log_stats=log_stats)
        run(engine)
        assert_counted(session, release, said)
        assert "own_step" in session.summary().why_steps_have_no_times


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("release", KINDS)
def test_a_step_that_is_replaced_after_install_is_recorded_to_the_token(
    release: str, when: str, said: Any, monkeypatch: pytest.MonkeyPatch
):
    """Before the engine is made, or after that."""
    with stubs(engines_of(release)), kvhook.install(ring_slots=64) as session:
        cls = vars(engines_of(release)[ENGINE])["LLMEngine"]
        engine = driven() if when == "after" else None
        with monkeypatch.context() as patch:
            patch.setattr(cls, "step", own_step)
            engine = engine or driven()
            run(engine)
            assert_counted(session, release, said)


@pytest.mark.parametrize("release", KINDS)
def test_a_loop_that_asks_the_engine_core_itself_is_recorded_to_the_token(release: str, said: Any):
    with stubs(engines_of(release)), kvhook.install(ring_slots=64) as session:
        engine = driven()
        while engine.engine_core.plan:
            own_step(engine)
        assert_counted(session, release, said)
        assert "takes the outputs from the engine core itself" in session.summary().why_steps_have_no_times


def test_a_loop_that_does_not_even_process_the_outputs_is_counted_as_the_core_tells():
    with stubs(engines_of("0.32.0")), kvhook.install(ring_slots=64) as session:
        engine = driven()
        while engine.engine_core.plan:
            engine.engine_core.get_output()
        steps = session.steps()
    assert steps["num_generation_tokens"].tolist() == TOKENS
    # nobody looks for c's stop string
    assert steps["num_finished_reqs"].tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("release", KINDS)
def test_one_message_is_enough_to_be_counted(release: str):
    with stubs(engines_of(release)), kvhook.install(ring_slots=64) as session:
        engine = driven(subclass(release))
        engine.step()
        steps = session.steps()
        assert steps["num_generation_tokens"].tolist() == TOKENS[:1]
        assert steps["num_prompt_tokens"].tolist() == PROMPT_TOKENS[:1]
        # reading in between changes nothing
        engine.step()
        session.steps()
        run(engine)
        assert session.steps()["num_generation_tokens"].tolist() == TOKENS
        assert session.steps()["num_finished_reqs"].tolist() == FINISHED


def test_added_and_aborted_requests_are_not_lost_when_outputs_begin_to_be_counted():
    with stubs(engines_of("0.32.0")), kvhook.install(ring_slots=64) as session:
        engine = driven(subclass("0.32.0"))
        engine.step()
        engine.abort_request(["c"])
        run(engine)
        steps = session.steps()
    assert steps["num_added_reqs"].sum() == 3
    assert steps["num_aborted_reqs"].sum() == 1
    assert steps["num_finished_reqs"].sum() == 3


def test_a_full_copy_that_makes_iteration_stats_keeps_level_full(said: Any):
    """Then there are no step times, and all else is there."""
    modules = engines_of("0.32.0")
    with stubs(modules):
        copied = vars(vars(modules[ENGINE])["LLMEngine"])["step"]
        copy: Any = types.FunctionType(copied.__code__, copied.__globals__, "step", copied.__defaults__)
        cls = type("FullCopy", (vars(modules[ENGINE])["LLMEngine"],), {"step": copy})
        with kvhook.install(ring_slots=64) as session:
            run(driven(cls))
            steps = session.steps()
            assert session.faults == {}
            assert len(session.requests()) == 3
    assert (steps["level"] == 0).all()
    assert steps["num_generation_tokens"].tolist() == TOKENS
    assert steps["ttft_count"].sum() == 3
    (warning,) = [text for text in said() if "LLMEngine.step" in text]
    assert "counted from" not in warning


def test_a_wrapper_around_vllms_step_changes_nothing(said: Any, monkeypatch: pytest.MonkeyPatch):
    with stubs(engines_of("0.32.0")), kvhook.install(ring_slots=64) as session:
        cls = vars(engines_of("0.32.0")[ENGINE])["LLMEngine"]
        before = cls.step
        with monkeypatch.context() as patch:
            patch.setattr(cls, "step", lambda self: before(self))
            run(driven())
            steps = session.steps()
    assert (steps["level"] == 0).all()
    assert (steps["t_end_ns"] > steps["t_start_ns"]).all()
    assert said() == []


def test_a_step_that_is_replaced_in_mid_run_makes_token_counts_unknown_not_wrong(
    said: Any, monkeypatch: pytest.MonkeyPatch
):
    """The first outputs of the new step are lost: nobody was counting."""
    with stubs(engines_of("0.32.0")), kvhook.install(ring_slots=64) as session:
        cls = vars(engines_of("0.32.0")[ENGINE])["LLMEngine"]
        engine = driven()
        add(engine, "d", Prompt(computed=3))
        engine.engine_core.plan += [Sent((Said("d"),), running=1)] * 3
        for _ in DRIVEN:
            engine.step()
        with monkeypatch.context() as patch:
            patch.setattr(cls, "step", own_step)
            run(engine)
            steps, summary = session.steps(), session.summary()
    assert len(steps) == 8
    assert steps["num_generation_tokens"].tolist()[6:] == [1, 1]
    assert summary.num_generation_tokens is None
    assert "nobody counted" in summary.not_recorded["num_generation_tokens"]
    assert any("nobody counted" in text for text in said())
    assert summary.prefix_cache_queries == 57


def test_outputs_that_are_read_past_every_hook_are_missed_and_that_is_said(said: Any):
    """As an older ROLL does: it has a method of its own that reads the client's queue."""
    with stubs(engines_of("0.32.0")):
        session = kvhook.install(ring_slots=64)
        engine = driven()
        client: Any = engine.engine_core
        while client.plan:
            outputs = core._message(client, client.plan.pop(0))
            engine.output_processor.process_outputs(outputs.outputs, **no_stats(engine, outputs))
        text = str(session.summary())
        assert "3 requests were added to an engine" in text
        assert "before LLM(" not in text
        kvhook.uninstall()
    (warning,) = [text for text in said() if "nothing was recorded" in text]
    assert "3 requests were added" in warning


@pytest.mark.parametrize("kind", ["vllm's", "own step"])
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_an_engine_goes_as_soon_as_nobody_holds_it(kind: str, steps: int):
    """vLLM ends its workers then. What is put into the engine must not wait for the garbage collector."""
    with stubs(engines_of("0.32.0")), kvhook.install(ring_slots=64):
        gc.collect()
        gc.disable()
        try:
            engine = driven(subclass("0.32.0") if kind == "own step" else None)
            for _ in range(steps):
                engine.step()
            alive = weakref.ref(engine)
            del engine
            assert alive() is None
        finally:
            gc.enable()
