"""The hooks over a vLLM that plays a script: what is patched, recorded, and put back; and that nothing gets out."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wrapt

import kvhook
from kvhook import hooks
from kvhook.hooks.registry import registry
from tests.conftest import Python
from tests.standin import ENGINE, LOGGERS, NO_STATS, STATS, VllmLogger, fake_vllm, step_stats

pytestmark = pytest.mark.usefixtures("fresh")


def play(engine: Any, *steps: Any) -> None:
    engine.plan += steps
    for _ in steps:
        assert engine.step() == ["output of the step"]


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


def test_a_deleted_engine_closes_its_ring_and_its_steps_stay():
    with fake_vllm() as vllm, kvhook.install() as session:
        engine = vllm.engine()
        play(engine, step_stats(), step_stats())
        (ring,) = Path(os.environ["KVHOOK_DIR"]).glob("*.ring")
        assert ring.read_bytes()[96] == 1
        del engine
        assert ring.read_bytes()[96] == 2
        assert len(session.steps()) == 2


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


# Putting back


@pytest.mark.parametrize("engines", [0, 1])
def test_uninstall_puts_back_the_very_objects(engines: int):
    with fake_vllm() as vllm:
        before = vllm.originals()
        kvhook.install()
        kept = [vllm.engine() for _ in range(engines)]
        assert all(vllm.originals()[name] is not before[name] for name in before)
        kvhook.uninstall()
        after = vllm.originals()
        assert all(after[name] is before[name] for name in before)
        for engine in kept:
            play(engine, step_stats())


def test_install_again_after_uninstall_patches_again():
    with fake_vllm() as vllm:
        for _ in range(3):
            with kvhook.install() as session:
                play(vllm.engine(), step_stats())
                assert len(session.steps()) == 1


def test_a_wrapper_of_somebody_else_over_ours_stays_and_ours_does_nothing_any_more():
    calls = []

    def theirs(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        calls.append("theirs")
        return wrapped(*args, **kwargs)

    with fake_vllm() as vllm:
        session = kvhook.install()
        engine = vllm.engine()
        wrapt.wrap_function_wrapper(ENGINE, "LLMEngine.step", theirs)
        over = vllm.originals()["LLMEngine.step"]
        kvhook.uninstall()
        assert vllm.originals()["LLMEngine.step"] is over
        play(engine, step_stats())
        assert calls == ["theirs"]
        assert len(session.steps()) == 0
        # and installing again does not record each step twice
        with kvhook.install() as again:
            other = vllm.engine()
            play(other, step_stats(), step_stats())
            assert len(again.steps()) == 2


def test_a_wrapper_of_somebody_else_below_ours_is_put_back():
    with fake_vllm() as vllm:
        wrapt.wrap_function_wrapper(ENGINE, "LLMEngine.step", lambda wrapped, instance, args, kwargs: wrapped(*args))
        theirs = vllm.originals()["LLMEngine.step"]
        with kvhook.install() as session:
            play(vllm.engine(), step_stats())
            assert len(session.steps()) == 1
        assert vllm.originals()["LLMEngine.step"] is theirs


def test_an_engine_that_outlives_the_session_works_on_unrecorded():
    with fake_vllm() as vllm:
        with kvhook.install() as session:
            engine = vllm.engine()
            play(engine, step_stats())
        play(engine, step_stats())
        assert len(session.steps()) == 1


# A vLLM that is not as expected


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "kvhook" and r.levelno >= logging.WARNING]


MISSING = {
    "no step": (lambda m: delattr(m[ENGINE].LLMEngine, "step"), "LLMEngine.step"),
    "no manager": (lambda m: delattr(m[ENGINE], "StatLoggerManager"), "StatLoggerManager"),
    "no record": (lambda m: delattr(m[LOGGERS].StatLoggerManager, "record"), "StatLoggerManager.record"),
    "no engine": (lambda m: delattr(m[ENGINE], "LLMEngine"), "LLMEngine"),
}


@pytest.mark.parametrize("what", MISSING)
def test_without_a_target_nothing_is_patched_and_one_warning_names_it(what: str, caplog: pytest.LogCaptureFixture):
    change, name = MISSING[what]
    with fake_vllm(change=change):
        import vllm.v1.engine.llm_engine as engine_module
        import vllm.v1.metrics.loggers as loggers_module

        classes = [vars(m).get(n) for m in (engine_module, loggers_module) for n in ("LLMEngine", "StatLoggerManager")]
        before = [dict(vars(c)) for c in classes if c is not None]
        kvhook.install()
        assert [dict(vars(c)) for c in classes if c is not None] == before
    (warning,) = warnings_in(caplog)
    assert "nothing is patched" in warning
    assert "0.32.0" in warning
    assert name in warning


def test_attach_to_a_vllm_nobody_knows_says_so():
    with fake_vllm(change=MISSING["no record"][0]) as vllm:
        engine = vllm.engine(log_stats=True)
        with pytest.raises(kvhook.KvhookError, match="not from a vLLM that this kvhook knows"):
            kvhook.attach(engine)


def test_without_a_target_that_is_not_required_the_rest_is_recorded():
    def change(modules: Any) -> None:
        del modules[STATS].IterationStats.update_from_finished_request

    with fake_vllm(change=change) as vllm, kvhook.install() as session:
        play(vllm.engine(), step_stats(finished=[{"finish_reason": 1, "num_prompt_tokens": 9}]))
        assert session.requests()["num_prompt_tokens"].tolist() == [9]
        assert "time_to_first_token" not in (session.requests().dtype.names or ())
        assert "time_to_first_token" in session.meta["absent"]


def test_vllm_not_installed_install_waits_for_the_import(python: Python):
    code = """
import sys
import kvhook
from tests.standin import build, step_stats, FakeVllm
from tests.contracts.loader import stubs
class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "vllm":
            raise ModuleNotFoundError("No module named 'vllm'", name="vllm")
not_installed = NotInstalled()
with stubs(build(), lazy=True):
    sys.meta_path.insert(0, not_installed)
    session = kvhook.install()
    try:
        import vllm
    except ImportError as error:
        print(error)
    print(len(session.steps()))
    # somebody types pip install in another window
    sys.meta_path.remove(not_installed)
    # as in vLLM itself: when the engine's module is there, those that it imports are
    import vllm.v1.metrics.loggers, vllm.v1.metrics.stats, vllm.v1.spec_decode.metrics
    import vllm.v1.engine.llm_engine
    engine = FakeVllm.engine()
    engine.plan += [step_stats(generated=5)]
    engine.step()
    print(session.steps()["num_generation_tokens"].tolist(), session.faults)
"""
    done = python(code)
    assert done.stdout.splitlines() == ["No module named 'vllm'", "0", "[5] {}"]
    assert done.stderr == ""


# Kvhook's own failures


class Broken:
    """Stats whose reading fails."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __getattr__(self, name: str) -> Any:
        raise self.error


def test_a_failure_in_the_publisher_never_reaches_the_engine(caplog: pytest.LogCaptureFixture):
    with fake_vllm() as vllm, kvhook.install() as session:
        bad, good = vllm.engine(), vllm.engine()
        play(bad, step_stats())
        play(bad, *((Broken(ValueError("no such number")), None, None) for _ in range(3)))
        play(good, step_stats(), step_stats())
        # counted, and switched off for this engine at the first time
        assert session.faults == {"recording a step": 1}
        assert len(session.steps(0)) == 1
        assert len(session.steps(1)) == 2
        assert session.summary().faults == {"recording a step": "ValueError: no such number"}
        assert "no such number" in str(session.summary())
    (warning,) = warnings_in(caplog)
    assert "recording a step failed: ValueError: no such number" in warning
    assert "The engine is not affected" in warning


def test_a_failure_while_vllms_loggers_are_on_never_reaches_the_engine(monkeypatch: pytest.MonkeyPatch):
    with fake_vllm() as vllm, kvhook.install() as session:
        engine = vllm.engine(log_stats=True)

        def fail(*_: Any, **__: Any) -> None:
            raise ValueError("x")

        (manager_id,) = registry.records
        monkeypatch.setitem(registry.records, manager_id, fail)
        play(engine, step_stats(), step_stats())
        assert session.faults == {"taking over the stats of a step": 1}
        assert len(engine.get_metrics()) == 2


def test_a_failure_while_an_engine_is_opened_leaves_it_unrecorded_and_working(monkeypatch: pytest.MonkeyPatch):
    with fake_vllm() as vllm, kvhook.install() as session:

        def fail(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("kvhook.recording.owner.Recorder", fail)
        play(vllm.engine(), step_stats(), step_stats())
        assert session.faults == {"starting to record an engine": 1}


def test_an_engine_that_cannot_be_built_fails_as_without_kvhook():
    def change(modules: Any) -> None:
        def start(self: Any, vllm_config: Any, executor_class: Any, log_stats: bool) -> None:
            raise ValueError("no model of this name")

        modules[ENGINE].LLMEngine.__init__ = start

    with fake_vllm(change=change) as vllm, kvhook.install() as session:
        with pytest.raises(ValueError, match="no model of this name"):
            vllm.engine()
        assert session.faults == {}


def test_wrong_arguments_fail_as_without_kvhook():
    with fake_vllm(), kvhook.install():
        from vllm.v1.engine.llm_engine import LLMEngine

        with pytest.raises(TypeError, match="log_stats"):
            LLMEngine(None, object)


def test_ctrl_c_inside_kvhook_belongs_to_the_user():
    with fake_vllm() as vllm, kvhook.install() as session:
        engine = vllm.engine()
        engine.plan += [(Broken(KeyboardInterrupt()), None, None)]
        with pytest.raises(KeyboardInterrupt):
            engine.step()
        # the session goes on: it was not kvhook that failed
        play(engine, step_stats())
        assert len(session.steps()) >= 1


# Fork


def test_after_a_fork_the_child_is_silent_and_the_parent_goes_on():
    with fake_vllm() as vllm, kvhook.install() as session:
        engine = vllm.engine()
        play(engine, step_stats(generated=1))
        pid = os.fork()
        if not pid:
            try:
                play(engine, step_stats(generated=100), step_stats(generated=100))
                kvhook.uninstall()
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        play(engine, step_stats(generated=1))
        assert session.steps()["num_generation_tokens"].tolist() == [1, 1]
        (ring,) = Path(os.environ["KVHOOK_DIR"]).glob("*.ring")
        assert ring.read_bytes()[96] == 1, "the child must not close its parent's ring"


def test_an_engine_freed_by_the_garbage_collector_in_the_middle_of_the_spools_work_hangs_nothing():
    with fake_vllm() as vllm, kvhook.install(ring_slots=64) as session:
        one, other = vllm.engine(), vllm.engine()
        for engine in (one, other):
            engine.plan.append(step_stats(kv_cache_usage=0.5, generated=3))
            engine.step()
        engines = [one, other]
        del one, other, engine
        # the finalizer runs in whichever thread collects, also in one that holds the spool's lock
        with session._spool._lock:
            engines.pop()
            assert session._spool._retiring
        engines.pop()
        assert session.steps()["num_generation_tokens"].tolist() == [3, 3]
        assert not session._spool._retiring
        assert [ring.read_bytes()[96] for ring in session.rings] == [2, 2], "both are closed"


def test_a_ring_is_unmapped_when_its_engine_is_gone():
    with fake_vllm() as vllm, kvhook.install(ring_slots=64) as session:
        engine = vllm.engine()
        play(engine, step_stats())
        (ring,) = session.rings
        assert str(ring) in Path("/proc/self/maps").read_text()
        del engine
        session.steps()  # if the spool was at work just then, it lets go of the engine now
        assert str(ring) not in Path("/proc/self/maps").read_text()


def test_what_somebody_else_has_put_in_the_place_of_the_manager_cannot_fail_the_engine():
    def instead(modules: dict[str, Any]) -> None:
        module: Any = modules[ENGINE]
        manager = module.StatLoggerManager
        module.StatLoggerManager = lambda **given: manager(**given)

    with fake_vllm(change=instead) as vllm, kvhook.install(ring_slots=64) as session:
        engine = vllm.engine()
        engine.plan.append(step_stats(kv_cache_usage=0.5))
        assert engine.step() == ["output of the step"]
        assert "keeping vLLM's own loggers away" in session.faults


def test_when_kvhook_leaves_stats_that_only_it_wanted_are_off_again():
    with fake_vllm() as vllm, kvhook.install(ring_slots=64):
        quiet, loud = vllm.engine(), vllm.engine(log_stats=True)
        assert (quiet.log_stats, loud.log_stats) == (True, True)
        kvhook.uninstall()
        assert (quiet.log_stats, loud.log_stats) == (False, True)


def test_an_engine_that_cannot_be_recorded_makes_no_stats_for_nobody(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any) -> None:
        raise OSError("no space left")

    with fake_vllm() as vllm, kvhook.install(ring_slots=64) as session:
        monkeypatch.setattr(session, "open_engine", fail)
        assert vllm.engine().log_stats is False
        assert session.faults == {"starting to record an engine": 1}


def test_attaching_an_engine_that_is_recorded_already_gives_its_session():
    with fake_vllm() as vllm, kvhook.install(ring_slots=64) as session:
        engine = vllm.engine()
        engine.log_stats = False  # as at level light
        assert kvhook.attach(engine) is session


def test_installing_after_the_session_was_closed_by_hand_records_again():
    with fake_vllm() as vllm:
        kvhook.install(ring_slots=64).close()
        with kvhook.install(ring_slots=64) as session:
            engine = vllm.engine()
            engine.plan.append(step_stats(kv_cache_usage=0.5))
            engine.step()
            assert len(session.steps()) == 1


def test_a_forked_child_may_install_at_another_level():
    with fake_vllm(), kvhook.install(ring_slots=64):
        pid = os.fork()
        if not pid:
            try:
                kvhook.install(ring_slots=64, level="light")
                os._exit(0 if set(hooks.patched()) <= {"v1-light", "v1-async-light"} else 2)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert "v1" in hooks.patched()
