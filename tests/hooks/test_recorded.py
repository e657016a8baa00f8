"""What the hooks record of a vLLM that plays a script, and what the user's own stats are meanwhile."""

from __future__ import annotations

import numpy as np
import pytest

import kvhook
from tests.standin import NO_STATS, VllmLogger, fake_vllm, play, step_stats

pytestmark = pytest.mark.usefixtures("fresh")


# What is recorded


def test_one_record_per_step_numbered_without_a_gap():
    with fake_vllm() as vllm, kvhook.install() as session:
        engine = vllm.engine()
        play(engine, *(step_stats() for _ in range(50)))
        steps = session.steps()
    assert steps["step"].tolist() == list(range(50))
    assert (steps["t_start_ns"] <= steps["t_end_ns"]).all()
    assert (steps["t_end_ns"][:-1] <= steps["t_start_ns"][1:]).all()


def test_a_step_without_stats_is_recorded_and_its_numbers_are_not_invented():
    with fake_vllm() as vllm, kvhook.install() as session:
        engine = vllm.engine()
        play(engine, step_stats(num_running_reqs=3, kv_cache_usage=0.5, generated=7), NO_STATS, step_stats())
        steps = session.steps()
    assert steps["has_scheduler_stats"].tolist() == [1, 0, 1]
    assert steps["num_running_reqs"].tolist() == [3, -1, 0]
    assert steps["num_kv_blocks_used"].tolist() == [30, -1, 0]
    assert np.isnan(steps["kv_cache_usage"]).tolist() == [False, True, False]
    assert steps["num_generation_tokens"].tolist() == [7, 0, 0]


def test_a_step_with_scheduler_stats_alone_has_them():
    with fake_vllm() as vllm, kvhook.install() as session:
        engine = vllm.engine()
        play(engine, step_stats(num_running_reqs=2, iteration=False))
        (step,) = session.steps()
    assert (step["has_scheduler_stats"], step["has_iteration_stats"]) == (1, 0)
    assert (step["num_running_reqs"], step["num_generation_tokens"]) == (2, 0)


def test_a_step_that_raises_raises_the_same_and_is_recorded():
    with fake_vllm() as vllm, kvhook.install() as session:
        engine = vllm.engine()
        error = RuntimeError("EngineDeadError")
        engine.plan += [error]
        with pytest.raises(RuntimeError) as caught:
            engine.step()
        assert caught.value is error
        play(engine, step_stats())
        steps = session.steps()
    assert steps["has_scheduler_stats"].tolist() == [0, 1]
    assert session.faults == {}


def test_waiting_requests_are_all_that_wait():
    # vLLM 0.20 split them; the name keeps its old meaning here.
    with fake_vllm() as vllm, kvhook.install() as session:
        play(vllm.engine(), step_stats(num_waiting_reqs=5, num_skipped_waiting_reqs=2))
        (step,) = session.steps()
    assert (step["num_waiting_reqs"], step["num_skipped_waiting_reqs"]) == (7, 2)


@pytest.mark.parametrize("release", ["0.11.0", "0.13.0", "0.16.0", "0.20.2", "0.33.0"])
def test_other_releases_have_the_same_columns_where_they_have_the_numbers(release: str):
    with fake_vllm(release) as vllm, kvhook.install() as session:
        play(vllm.engine(), step_stats(num_running_reqs=4, kv_cache_usage=0.25, prefix={"queries": 10, "hits": 6}))
        (step,) = session.steps()
        meta = session.meta
    assert (step["num_running_reqs"], step["kv_cache_usage"]) == (4, 0.25)
    assert (step["prefix_cache_queries"], step["prefix_cache_hits"]) == (10, 6)
    assert meta["vllm"] == release
    names = set(step.dtype.names)
    assert not names & meta["absent"].keys()
    assert ("num_skipped_waiting_reqs" in names) == (release >= "0.20")


def test_what_this_vllm_cannot_give_is_absent_with_a_reason():
    with fake_vllm() as vllm, kvhook.install() as session:
        play(vllm.engine(), step_stats())
        steps, absent = session.steps(), session.meta["absent"]
    assert "num_swapped_reqs" not in (steps.dtype.names or ())
    assert absent["num_swapped_reqs"] == "vLLM's v1 engine has no such number"
    assert absent["num_evicted_blocks_sampled"] == "needs kv_cache_metrics=True"


def test_unknown_number_of_blocks_is_said_and_not_guessed():
    with fake_vllm() as vllm, kvhook.install() as session:
        play(vllm.engine(num_gpu_blocks=None), step_stats(kv_cache_usage=0.5))
        (step,) = session.steps()
        assert "how many KV blocks" in session.meta["absent"]["num_kv_blocks_used"]
    assert step["kv_cache_usage"] == 0.5
    assert "num_kv_blocks_used" not in step.dtype.names


def test_two_engines_have_their_own_numbers():
    with fake_vllm() as vllm, kvhook.install() as session:
        one, two = vllm.engine(), vllm.engine(log_stats=True)
        play(one, step_stats(generated=1), step_stats(generated=1))
        play(two, step_stats(generated=10))
        play(one, step_stats(generated=1))
        assert session.steps(0)["num_generation_tokens"].tolist() == [1, 1, 1]
        assert session.steps(1)["num_generation_tokens"].tolist() == [10]
        assert session.steps()["engine"].tolist().count(1) == 1
        assert session.summary().engines == 2
        assert session.summary(1).num_generation_tokens == 10


# The user's stats on and off


def test_with_stats_off_kvhook_is_alone_in_the_list_of_loggers():
    with fake_vllm() as vllm, kvhook.install():
        engine = vllm.engine(log_stats=False)
        assert len(engine.logger_manager.stat_loggers) == 1
        assert type(engine.logger_manager.stat_loggers[0]).__module__.startswith("kvhook")


def test_with_stats_off_get_metrics_still_refuses():
    with fake_vllm() as vllm, kvhook.install():
        engine = vllm.engine(log_stats=False)
        with pytest.raises(AssertionError, match="Stat logging disabled"):
            engine.get_metrics()


def test_with_stats_off_whatever_a_manager_is_asked_is_answered():
    # vLLM calls these on every logger; a new method of a later release must not raise either.
    with fake_vllm() as vllm, kvhook.install():
        (logger,) = vllm.engine(log_stats=False).logger_manager.stat_loggers
        assert logger.log() is None
        assert logger.record_sleep_state(1, 2) is None
        assert logger.of_a_release_to_come(3, x=4) is None


def test_with_stats_on_vllms_loggers_see_each_step_and_kvhook_too():
    with fake_vllm() as vllm, kvhook.install() as session:
        engine = vllm.engine(log_stats=True)
        stats = [step_stats(generated=n) for n in (1, 2, 3)]
        play(engine, *stats)
        assert [type(logger) for logger in engine.logger_manager.stat_loggers] == [VllmLogger]
        assert engine.get_metrics() == [(sched, iteration) for sched, iteration, _ in stats]
        assert session.steps()["num_generation_tokens"].tolist() == [1, 2, 3]
