"""The hooks from install to uninstall: the very objects are put back, engines may go first, processes may fork."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import wrapt

import kvhook
from kvhook import hooks
from tests.standin import ENGINE, fake_vllm, play, step_stats

pytestmark = pytest.mark.usefixtures("fresh")


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


def test_when_kvhook_leaves_stats_that_only_it_wanted_are_off_again():
    with fake_vllm() as vllm, kvhook.install(ring_slots=64):
        quiet, loud = vllm.engine(), vllm.engine(log_stats=True)
        assert (quiet.log_stats, loud.log_stats) == (True, True)
        kvhook.uninstall()
        assert (quiet.log_stats, loud.log_stats) == (False, True)


# Installing and attaching again


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


# Engines that are gone


def test_a_deleted_engine_closes_its_ring_and_its_steps_stay():
    with fake_vllm() as vllm, kvhook.install() as session:
        engine = vllm.engine()
        play(engine, step_stats(), step_stats())
        (ring,) = Path(os.environ["KVHOOK_DIR"]).glob("*.ring")
        assert ring.read_bytes()[96] == 1
        del engine
        assert ring.read_bytes()[96] == 2
        assert len(session.steps()) == 2


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


# Fork


def test_a_forked_child_that_drives_the_parents_engine_leaves_the_parents_ring_alone():
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
        (ring,) = session.rings
        assert ring.read_bytes()[96] == 1, "the child must not close its parent's ring"
        # the child records into a ring of its own, which os._exit() leaves there if it comes at the wrong moment
        assert {ring} <= set(Path(os.environ["KVHOOK_DIR"]).glob("*.ring"))


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
