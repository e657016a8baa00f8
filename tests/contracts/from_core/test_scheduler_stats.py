"""The scheduler's stats are taken where the engine core's outputs arrive, in every release that has V1.

What `LLMEngine.step` hands to its loggers is written down in `core._engines` as it was read in vLLM's sources: nothing
for a step without outputs in 0.17 to 0.27.1. What must be recorded stands in the scripts, counted by hand.
"""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

import kvhook
from tests.contracts.behaviour import VllmLogger
from tests.contracts.core import NoMore, Prompt, Said, Sent, add
from tests.contracts.core_engines import ON_LOOP, V1_RELEASES, engines_of
from tests.contracts.from_core.chunked import KINDS, chunked, looked_up, run
from tests.contracts.loader import stubs
from tests.contracts.releases import between

pytestmark = pytest.mark.usefixtures("fresh")


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
