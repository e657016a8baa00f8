"""The scheduler's stats are taken where the engine core's outputs arrive, in every release that has V1.

What `LLMEngine.step` hands to its loggers is written down in `core._engines` as it was read in vLLM's sources: nothing
for a step without outputs in 0.17 to 0.27.1. What must be recorded stands in the scripts, counted by hand.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import kvhook
from tests.contracts import core
from tests.contracts.behaviour import ASYNC, ENGINE, VllmLogger, config_of, make_engine
from tests.contracts.core import NoMore, Prompt, Said, Sent, add
from tests.contracts.loader import build_stub_modules, load, releases, stubs
from tests.contracts.releases import between

pytestmark = pytest.mark.usefixtures("fresh")

V1_RELEASES = [release for release in releases() if between(release, "0.8.0")]
SYNC, ON_LOOP = f"{ENGINE}:LLMEngine", f"{ASYNC}:AsyncLLM"
#: one release of each way in which stats pass: see the table in tests/README.md
KINDS = ["0.8.5", "0.9.2", "0.10.2", "0.11.0", "0.13.0", "0.19.1", "0.26.0", "0.32.0"]
#: up to 0.8 the prefix cache counts blocks, and these are of 16 tokens
UNIT = 16


@functools.cache
def engines_of(release: str) -> dict[str, types.ModuleType]:
    modules = build_stub_modules(load(release))
    core.animate(load(release), modules)
    return modules


@pytest.fixture(autouse=True)
def _forget_loggers() -> Iterator[None]:
    gc.collect()  # no engine of an earlier test is alive
    VllmLogger.made.clear()
    yield
    VllmLogger.made.clear()


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The warnings that kvhook has given so far."""
    return lambda: [r.getMessage() for r in caplog.records if r.name == "kvhook" and r.levelno >= logging.WARNING]


#: a prompt of 40 tokens in chunks of 16: two steps bring no output, and the look-up belongs to the first
CHUNKED = (
    Sent(running=1, looked_up=40, found=16),
    Sent(running=1),
    Sent((Said("a"),), running=1),
    Sent((Said("a", finished=True),), running=0),
)


def chunked(path: str = SYNC, *, log_stats: bool = False, script: tuple[Sent, ...] = CHUNKED) -> Any:
    """An engine with one request, whose core will send this."""
    engine = make_engine(path, log_stats=log_stats)
    add(engine, "a", Prompt(computed=24, cached=16))
    engine.engine_core.plan += script
    return engine


def run(engine: Any) -> None:
    while engine.engine_core.plan:
        engine.step()


def looked_up(steps: Any, release: str) -> list[tuple[int, int]]:
    """Look-ups and hits of each step, in the unit in which this vLLM counts."""
    unit = UNIT if between(release, "0.8.0", "0.8.5.post1") else 1
    return [(int(s["prefix_cache_queries"]) // unit, int(s["prefix_cache_hits"]) // unit) for s in steps]


def drops(release: str) -> bool:
    return between(release, "0.17.0", "0.27.1")


# Stats of steps without outputs


@pytest.mark.parametrize("level", ["full", "light"])
@pytest.mark.parametrize("release", V1_RELEASES)
def test_the_look_ups_of_a_chunked_prompt_are_recorded(release: str, level: str):
    with stubs(engines_of(release)), kvhook.install(ring_slots=64, level=level) as session:
        run(chunked())
        assert session.faults == {}
        steps, summary = session.steps(), session.summary()
    assert steps["has_scheduler_stats"].tolist() == [1, 1, 1, 1]
    assert steps["num_running_reqs"].tolist() == [1, 1, 1, 0]
    assert looked_up(steps, release) == [(40, 16), (0, 0), (0, 0), (0, 0)]
    assert summary.prefix_cache_hit_rate == pytest.approx(0.4)
    assert steps["num_generation_tokens"].tolist() == [0, 0, 1, 1]
    assert summary.num_finished_reqs == 1


@pytest.mark.parametrize("release", [r for r in V1_RELEASES if between(r, "0.9.0")])
def test_it_is_recorded_which_stats_vllms_loggers_got_and_they_get_what_they_got(release: str):
    seen = []
    for with_kvhook in (False, True):
        VllmLogger.made.clear()
        with stubs(engines_of(release)):
            if with_kvhook:
                kvhook.install(ring_slots=64)
            run(chunked(log_stats=True))
            (logger,) = VllmLogger.made
            seen.append([stats.prefix_cache_stats.queries for stats in logger.seen])
            if with_kvhook:
                session = kvhook.install()
                steps, summary, faults = session.steps(), session.summary(), session.faults
            kvhook.uninstall()
    assert seen[0] == seen[1] == ([0, 0] if drops(release) else [40, 0, 0, 0])
    assert faults == {}
    assert steps["scheduler_stats_logged"].tolist() == ([0, 0, 1, 1] if drops(release) else [1, 1, 1, 1])
    # only where something is missing is that said
    assert ("vLLM's own counters missed" in str(summary)) == drops(release)


@pytest.mark.parametrize("release", KINDS)
def test_stats_that_a_run_left_behind_are_recorded_with_the_next(release: str):
    """Asynchronous scheduling in the process: the last batch of a run is read by the first step of the next."""
    with stubs(engines_of(release)), kvhook.install(ring_slots=64) as session:
        engine = chunked(script=(Sent((Said("a", finished=True),), running=0),))
        run(engine)
        add(engine, "b", Prompt(computed=9, cached=32))
        engine.engine_core.plan += (
            Sent(running=0, looked_up=41, found=32),
            Sent((Said("b", finished=True),), running=0),
        )
        run(engine)
        steps = session.steps()
    assert looked_up(steps, release) == [(0, 0), (41, 32), (0, 0)]
    assert steps["has_scheduler_stats"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("release", V1_RELEASES)
def test_a_step_is_without_stats_only_if_the_core_sent_none(release: str):
    script = (Sent((Said("a"),), running=1, looked_up=40), Sent((Said("a"),), running=None), Sent(running=1))
    if between(release, "0.9.0", "0.11.0"):
        script = (script[0], Sent(running=None), script[2])
    with stubs(engines_of(release)), kvhook.install(ring_slots=64) as session:
        run(chunked(script=script))
        assert session.faults == {}
        assert session.steps()["has_scheduler_stats"].tolist() == [1, 0, 1]
        assert session.summary().steps_without_stats == 1


# 0.9.0 to 0.11.0: the step asserts that there are stats, if stats are on

ASSERTS = [release for release in V1_RELEASES if between(release, "0.9.0", "0.11.0")]
NO_STATS = (Sent((Said("a"),), running=1), Sent(running=None), Sent((Said("a", finished=True),), running=0))


@pytest.mark.parametrize("release", ASSERTS)
def test_a_step_without_stats_does_not_raise_where_the_user_left_them_off(release: str):
    with stubs(engines_of(release)):
        run(chunked(script=NO_STATS))  # as it is without kvhook
        with kvhook.install(ring_slots=64) as session:
            run(chunked(script=NO_STATS))
            assert session.faults == {}
            steps = session.steps()
    assert steps["has_scheduler_stats"].tolist() == [1, 0, 1]
    assert steps["num_running_reqs"].tolist() == [1, -1, 0]
    assert steps["num_generation_tokens"].tolist() == [1, 0, 1]


@pytest.mark.parametrize("release", ASSERTS)
def test_where_the_users_stats_are_on_it_raises_as_it_does_without_kvhook(release: str):
    for with_kvhook in (False, True):
        with stubs(engines_of(release)):
            if with_kvhook:
                session = kvhook.install(ring_slots=64)
            engine = chunked(log_stats=True, script=NO_STATS)
            engine.step()
            with pytest.raises(AssertionError):
                engine.step()
            engine.step()
            if with_kvhook:
                assert session.faults == {}
                # the step that failed is there, and what came after it
                assert session.steps()["has_scheduler_stats"].tolist() == [1, 0, 1]
                kvhook.uninstall()


# Engines that are driven by another step than vLLM's own

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


# The event loop


@pytest.mark.parametrize("release", KINDS)
def test_on_an_event_loop_each_step_is_recorded_once(release: str):
    with stubs(engines_of(release)), kvhook.install(ring_slots=64) as session:
        asyncio.run(chunked(ON_LOOP).handle_outputs())
        assert session.faults == {}
        assert looked_up(session.steps(), release) == [(40, 16), (0, 0), (0, 0), (0, 0)]


@pytest.mark.parametrize("release", ["0.10.2", "0.32.0"])
def test_on_an_event_loop_stats_that_nobody_records_are_recorded_and_tokens_are_not_known(release: str, said: Any):
    """A handler of somebody's own, which hands nothing to vLLM's loggers."""

    async def handle(engine: Any) -> None:
        while True:
            try:
                outputs = await engine.engine_core.get_output_async()
            except NoMore:
                return
            engine.output_processor.process_outputs(outputs.outputs, outputs.timestamp, None)

    with stubs(engines_of(release)), kvhook.install(ring_slots=64) as session:
        engine = chunked(ON_LOOP)
        engine.engine_core.plan.append(Sent(running=0))
        asyncio.run(handle(engine))
        assert session.faults == {}
        steps, summary = session.steps(), session.summary()
    assert looked_up(steps, release)[:4] == [(40, 16), (0, 0), (0, 0), (0, 0)]
    assert summary.num_generation_tokens is None
    assert len([text for text in said() if "nobody counted" in text]) == 1


# What the core ends itself


@pytest.mark.parametrize("release", [r for r in KINDS if between(r, "0.13.0")])
def test_requests_that_the_core_aborts_are_finished_requests_without_latencies(release: str):
    """It sends them without the scheduler's stats (sleep, shutdown, a request that is refused)."""
    script = (Sent((Said("a"),), running=1), Sent((Said("a", tokens=0, aborted=True),), running=None))
    with stubs(engines_of(release)), kvhook.install(ring_slots=64) as session:
        run(chunked(script=script))
        steps, requests = session.steps(), session.requests()
        assert session.faults == {}
    assert steps["num_finished_reqs"].sum() == 1
    assert requests["finish_reason"].tolist() == ["abort"]
    assert np.isnan(requests["mean_time_per_output_token"]).all()
