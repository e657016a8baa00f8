"""The hooks over a vLLM that is not as expected, and failures of kvhook's own: none gets out."""

from __future__ import annotations

import logging
from typing import Any

import pytest

import kvhook
from kvhook.hooks.registry import registry
from tests.conftest import Python
from tests.standin import ENGINE, LOGGERS, STATS, fake_vllm, play, step_stats

pytestmark = pytest.mark.usefixtures("fresh")


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


def test_an_engine_that_cannot_be_recorded_makes_no_stats_for_nobody(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any) -> None:
        raise OSError("no space left")

    with fake_vllm() as vllm, kvhook.install(ring_slots=64) as session:
        monkeypatch.setattr(session, "open_engine", fail)
        assert vllm.engine().log_stats is False
        assert session.faults == {"starting to record an engine": 1}
