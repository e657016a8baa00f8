"""The reason that is given for a run without steps is the true one: here each time something else was made to fail."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kvhook
from kvhook import stat_logger
from tests.contracts.behaviour import ASYNC, ENGINE, make_engine
from tests.contracts.core_engines import engines_of
from tests.contracts.loader import stubs
from tests.contracts.made_stats import v1_stats
from tests.standin import LOGGERS, fake_vllm, play, step_stats

UNTRUE = "does not call the __init__"


@pytest.fixture
def logger_class() -> Iterator[None]:
    """`kvhook.StatLogger` is made anew from the vLLM of the test."""
    for names in (vars(stat_logger), kvhook.__dict__):
        names.pop("StatLogger", None)
    yield
    kvhook.uninstall()
    for names in (vars(stat_logger), kvhook.__dict__):
        names.pop("StatLogger", None)


def test_a_ring_that_cannot_be_made_is_the_reason_everywhere(fresh: Path, caplog: pytest.LogCaptureFixture):
    folder = fresh / "rings"
    with fake_vllm() as vllm:
        session = kvhook.install(ring_dir=folder)
        for each in folder.iterdir() if folder.is_dir() else ():
            each.unlink()
        folder.rmdir()
        folder.write_text("")
        engine = vllm.engine()
        play(engine, step_stats(generated=1))
        assert "NotADirectoryError" in str(session.summary())
        kvhook.uninstall()
    (reason,) = [r.getMessage() for r in caplog.records if "nothing was recorded" in r.getMessage()]
    assert "NotADirectoryError" in reason
    assert UNTRUE not in caplog.text


def test_a_vllm_that_does_not_fit_is_the_reason(fresh: Path, caplog: pytest.LogCaptureFixture):
    def change(modules: dict[str, Any]) -> None:
        del modules[LOGGERS].StatLoggerManager.record

    with fake_vllm(change=change) as vllm:
        session = kvhook.install()
        engine = vllm.engine(log_stats=False)
        text = str(session.summary())
        kvhook.uninstall()
        del engine
    (reason,) = [r.getMessage() for r in caplog.records if "nothing was recorded" in r.getMessage()]
    for said in (text, reason):
        assert "StatLoggerManager" in said
        assert UNTRUE not in said


def test_a_fault_that_stops_nothing_is_not_the_reason(fresh: Path):
    with fake_vllm() as vllm, kvhook.install() as session:
        session.fault("noting a request's label", ValueError("odd"), "this request has none")
        engine = vllm.engine()
        assert "call llm.generate" in session.why_no_steps()
        del engine


@pytest.mark.usefixtures("logger_class")
@pytest.mark.parametrize("release", ["0.11.0", "0.26.0", "0.32.0"])
def test_a_logger_in_an_llm_engine_records_what_vllm_hands_to_loggers(
    fresh: Path, caplog: pytest.LogCaptureFixture, release: str
):
    """The stand-in's manager gives its loggers what a real one does; AsyncLLM's module is not imported."""
    with stubs({name: m for name, m in engines_of(release).items() if name != ASYNC}):
        engine = make_engine(f"{ENGINE}:LLMEngine", log_stats=True)
        # what LLMEngine(stat_loggers=[...]) does within its __init__
        made: dict[str, Any] = {"kvhook": kvhook, "__name__": ENGINE, "config": engine.vllm_config}
        exec("logger = kvhook.StatLogger(config, 0)", made)
        for _ in range(5):
            made["logger"].record(*v1_stats())
        session = kvhook.StatLogger.session()
        steps, summary = session.steps(), session.summary()
        assert session.faults == {}
        kvhook.uninstall()
        del engine
    assert steps["num_generation_tokens"].tolist() == [4] * 5
    assert "sees no step of an LLMEngine" in str(summary)
    assert (summary.by_label, summary.by_lora_name) == ([], []), "no request was seen when it was added"
    warnings = [r.getMessage() for r in caplog.records]
    assert sum("kvhook.StatLogger is in an LLMEngine" in each for each in warnings) == 1
    assert "kvhook.install() before" in caplog.text
    assert UNTRUE not in caplog.text


@pytest.mark.usefixtures("logger_class")
def test_an_engine_beside_an_idle_logger_is_not_said_to_be_odd(fresh: Path, caplog: pytest.LogCaptureFixture):
    with fake_vllm() as vllm:
        engine = vllm.engine(log_stats=True)
        kvhook.StatLogger(engine.vllm_config, 0)
        kvhook.uninstall()
        del engine
    assert UNTRUE not in caplog.text
