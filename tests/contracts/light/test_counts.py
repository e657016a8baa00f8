"""Level light counts what the engine core sent, in every release that has V1, and vLLM makes what it would make."""

from __future__ import annotations

import asyncio

import pytest

import kvhook
from tests.contracts.behaviour import VllmLogger
from tests.contracts.core import Said, Sent
from tests.contracts.core_engines import ON_LOOP, SYNC, V1_RELEASES, engines_of
from tests.contracts.light.expected import BY_NAME, ENGINES
from tests.contracts.light.script import EXPECTED, RUNNING, SCRIPT, begin, check, go
from tests.contracts.loader import stubs
from tests.contracts.patching import everything, same
from tests.contracts.releases import ALL, between

pytestmark = pytest.mark.usefixtures("fresh")


@pytest.mark.parametrize("log_stats", [False, True], ids=["off", "on"])
@pytest.mark.parametrize(("release", "name"), ENGINES)
def test_counts_are_what_the_core_sent(release: str, name: str, log_stats: bool):
    with stubs(engines_of(release)):
        before = everything(engines_of(release))
        with kvhook.install(level="light", ring_slots=64) as session:
            engine = begin(BY_NAME[name].engine, log_stats=log_stats)
            outputs = go(engine)
            assert session.faults == {}
            steps = session.steps()
            meta = session.meta["engines"][0]
        check(steps, release)
        assert steps["num_running_reqs"].tolist() == RUNNING
        assert steps["step"].tolist() == list(range(len(SCRIPT)))
        assert (steps["level"] == 1).all()
        assert len(session.requests()) == 0
        assert meta["levels"] == [{"step": 0, "level": "light"}]
        assert meta["stats_on"] is log_stats
        # the engine has done what it does without kvhook
        assert outputs in ([], [["a", "b"], ["b", "a"], [], ["c", "b"], ["c", "a"], []])
        assert engine.engine_core.aborted == ["c"]
        assert engine.output_processor.request_states == {}
        assert same(everything(engines_of(release)), before)


@pytest.mark.parametrize(("release", "name"), ENGINES)
def test_with_the_users_stats_off_the_core_makes_stats_and_the_front_end_none(release: str, name: str):
    with stubs(engines_of(release)), kvhook.install(level="light", ring_slots=64):
        engine = begin(BY_NAME[name].engine, log_stats=False)
        go(engine)
        assert (engine.log_stats, engine.output_processor.log_stats) == (False, False)
        assert engine.engine_core.log_stats is True
        assert set(engine.output_processor.given) == {None}
        assert VllmLogger.made == []


@pytest.mark.parametrize(("release", "name"), [e for e in ENGINES if e[1] != "v1-light-0.8"])
def test_with_the_users_stats_on_vllm_makes_and_sees_its_own(release: str, name: str):
    with stubs(engines_of(release)), kvhook.install(level="light", ring_slots=64):
        engine = begin(BY_NAME[name].engine, log_stats=True)
        go(engine)
        assert (engine.log_stats, engine.output_processor.log_stats) == (True, True)
        made = [stats is not None for stats in engine.output_processor.given]
        if "async" in name:  # it takes outputs in slices, and makes nothing of a step without outputs
            assert made
            assert all(made)
        else:  # in 0.28 it began to make none for a step without outputs
            assert made == [bool(sent.outputs) or not between(release, "0.28.0") for sent in SCRIPT]
        (logger,) = VllmLogger.made
        # LLMEngine of these does not hand over the stats of such a step
        drops = name == "v1-light" and between(release, "0.17.0", "0.27.1")
        seen = [n for n, sent in zip(RUNNING, SCRIPT, strict=True) if sent.outputs or not drops]
        assert [stats.num_running_reqs for stats in logger.seen] == seen


@pytest.mark.parametrize("release", V1_RELEASES)
@pytest.mark.parametrize("path", [SYNC, ON_LOOP])
def test_level_full_counts_the_same(release: str, path: str):
    """The script is played as vLLM plays it: where vLLM counts itself it counts what is expected here."""
    with stubs(engines_of(release)), kvhook.install(ring_slots=64) as session:
        go(begin(path))
        assert session.faults == {}
        steps = session.steps()
    # vLLM of 0.8 and 0.9 makes iteration stats also where nothing came back
    came = steps["has_iteration_stats"].tolist()
    check(steps, release, tuple((came[i], *row[1:]) for i, row in enumerate(EXPECTED)))


@pytest.mark.parametrize("arrays", [False, True], ids=["lists", "arrays"])
@pytest.mark.parametrize("chunk", [1, 2, 100])
@pytest.mark.parametrize("release", ["0.8.0", "0.9.0", "0.12.0", ALL[-1]])
def test_on_an_event_loop_slices_are_one_step(release: str, chunk: int, arrays: bool):
    with stubs(engines_of(release)), kvhook.install(level="light", ring_slots=64) as session:
        engine = begin(ON_LOOP)
        asyncio.run(engine.handle_outputs(chunk, arrays))
        assert session.faults == {}
        check(session.steps(), release)
        assert (session.steps()["t_start_ns"] == session.steps()["t_end_ns"]).all()
        assert session.summary().step_time.count == 0


@pytest.mark.parametrize("release", [r for r in V1_RELEASES if between(r, "0.8.3")])
def test_on_an_event_loop_each_rank_has_its_own_records(release: str):
    script = (Sent((Said("a"),), rank=1), Sent((Said("b", tokens=2),), rank=0), Sent((Said("a", tokens=4),), rank=1))
    with stubs(engines_of(release)), kvhook.install(level="light", ring_slots=64) as session:
        go(begin(ON_LOOP, script=script, data_parallel_size=2))
        steps = session.steps()
        by_rank = {r: steps[steps["engine_index"] == r]["num_generation_tokens"].tolist() for r in (0, 1)}
        assert by_rank == {0: [2], 1: [1, 4]}
        assert len(session.meta["engines"]) == 2


def test_outputs_that_bring_no_scheduler_stats_are_counted_all_the_same():
    script = (Sent((Said("a"),), running=None), Sent(running=None), Sent((Said("a"),), running=1))
    for path in (SYNC, ON_LOOP):
        with stubs(engines_of("0.32.0")), kvhook.install(level="light", ring_slots=64) as session:
            go(begin(path, script=script))
            steps = session.steps()
        assert steps["has_scheduler_stats"].tolist() == [0, 0, 1]
        assert steps["num_running_reqs"].tolist() == [-1, -1, 1]
        assert steps["num_generation_tokens"].tolist() == [1, 0, 1]
