"""install, uninstall, attach, the session as a context, and the arguments they take."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

import kvhook
from kvhook.errors import StatsOffError
from kvhook.options import parse_size
from tests.conftest import Python
from tests.standin import fake_vllm, step_stats

pytestmark = pytest.mark.usefixtures("fresh")


def play(engine: Any, count: int = 1) -> None:
    engine.plan += [step_stats() for _ in range(count)]
    for _ in range(count):
        engine.step()


# install and uninstall


def test_installing_twice_is_installing_once():
    with fake_vllm() as vllm:
        session = kvhook.install()
        step = vllm.originals()["LLMEngine.step"]
        assert kvhook.install() is session
        assert vllm.originals()["LLMEngine.step"] is step
        play(vllm.engine(), 3)
        assert len(session.steps()) == 3


def test_after_uninstall_install_gives_a_new_session():
    first = kvhook.install()
    kvhook.uninstall()
    second = kvhook.install()
    assert second is not first
    assert "closed" in repr(first)
    assert "recording" in repr(second)


def test_uninstall_without_install_does_nothing():
    kvhook.uninstall()
    kvhook.uninstall()


def test_with_ends_the_session_also_when_the_body_fails():
    with fake_vllm() as vllm:
        before = vllm.originals()

        def body() -> None:
            with kvhook.install() as session:
                sessions.append(session)
                play(vllm.engine())
                raise ZeroDivisionError

        sessions: list[kvhook.Session] = []
        with pytest.raises(ZeroDivisionError):
            body()
        assert vllm.originals() == before
        assert "closed" in repr(sessions[0])
        assert len(sessions[0].steps()) == 1


def test_what_was_recorded_can_be_read_after_the_end():
    with fake_vllm() as vllm:
        with kvhook.install() as session:
            play(vllm.engine(), 5)
        session.close()
        assert len(session.steps()) == 5
        assert session.summary().steps == 5


def test_a_session_that_was_closed_by_hand_records_no_new_engine():
    with fake_vllm() as vllm:
        session = kvhook.install()
        session.close()
        play(vllm.engine(), 2)
        assert len(session.steps()) == 0
        assert session.faults == {}


def test_reading_while_it_records_brings_what_there_is_so_far():
    with fake_vllm() as vllm, kvhook.install() as session:
        engine = vllm.engine()
        for n in (1, 2, 3):
            play(engine)
            assert len(session.steps()) == n


def test_temporary_history_is_gone_when_the_process_ends_and_the_ring_stays(tmp_path: Path, python: Python):
    code = """
import os
import kvhook
from tests.standin import fake_vllm, step_stats
with fake_vllm() as vllm:
    session = kvhook.install()
    engine = vllm.engine()
    engine.plan += [step_stats()]
    engine.step()
    print(*os.listdir(os.environ["TMPDIR"]))
"""
    said = python(code, TMPDIR=str(tmp_path / "disk")).stdout
    assert "kvhook-history-" in said
    assert list((tmp_path / "disk").iterdir()) == [], "temporary files stay behind"
    (ring,) = (tmp_path / "rings").iterdir()
    assert len(kvhook.open(ring).steps()) == 1


# trace=


def test_trace_is_streamed_to_the_file(fresh: Path):
    with fake_vllm() as vllm:
        with kvhook.install(trace=fresh / "run.kvh") as session:
            play(vllm.engine(), 7)
            assert len(session.steps()) == 7
        trace = kvhook.open(fresh / "run.kvh")
    assert len(trace.steps()) == 7
    assert trace.meta["vllm"] == "0.32.0"
    assert trace.meta["engines"][0]["model"] == "stand-in"


def test_installing_again_with_another_trace_warns_that_it_has_no_effect(fresh: Path, caplog: pytest.LogCaptureFixture):
    with kvhook.install(trace=fresh / "a.kvh") as session:
        assert kvhook.install(trace=fresh / "a.kvh") is session
        assert kvhook.install() is session
        assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
        assert kvhook.install(trace=fresh / "b.kvh") is session
        (warning,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert "installed already" in warning
    assert "b.kvh" in warning
    assert not (fresh / "b.kvh").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [("run.csv", "ends in .kvh"), ("no/run.kvh", "no directory")],
)
def test_unusable_trace_is_an_error_at_install(fresh: Path, name: str, message: str):
    with pytest.raises(kvhook.KvhookError, match=message):
        kvhook.install(trace=fresh / name)
    with kvhook.install() as session:
        assert "recording" in repr(session)


# Arguments


@pytest.mark.parametrize("slots", [0, -1, 1 << 30, 1.5, "many", True])
def test_unusable_ring_slots_are_refused(slots: Any):
    with pytest.raises(kvhook.KvhookError, match="ring_slots"):
        kvhook.install(ring_slots=slots)


def test_ring_slots_are_rounded_up_to_a_power_of_two(fresh: Path):
    with fake_vllm() as vllm, kvhook.install(ring_slots=1000):
        vllm.engine()
        (ring,) = (fresh / "rings").iterdir()
        assert int.from_bytes(ring.read_bytes()[24:32], "little") == 1024


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (12345, 12345),
        ("12345", 12345),
        ("1k", 1024),
        ("1KiB", 1024),
        ("1kB", 1000),
        ("500MB", 500_000_000),
        ("2g", 2 << 30),
        (" 1.5 GiB ", 3 << 29),
        ("1TiB", 1 << 40),
    ],
)
def test_sizes(text: Any, size: int):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "many", "1XB", "-1", "1 2", None, 1.5, True, "MB"])
def test_what_is_no_size_is_refused(text: Any):
    with pytest.raises(kvhook.KvhookError, match="is not a size"):
        kvhook.install(history=text)


# attach


def test_attach_records_an_engine_that_has_its_stats_on():
    with fake_vllm() as vllm:
        engine = vllm.engine(log_stats=True)
        play(engine)
        session = kvhook.attach(engine)
        play(engine, 2)
        assert kvhook.attach(engine) is session
        play(engine)
        assert session.steps()["step"].tolist() == [0, 1, 2]
        assert (session.steps()["has_scheduler_stats"] == 1).all()


def test_attach_takes_the_llm_too():
    class LLM:
        def __init__(self, engine: Any) -> None:
            self.llm_engine = engine

    with fake_vllm() as vllm:
        llm = LLM(vllm.engine(log_stats=True))
        session = kvhook.attach(llm)
        play(llm.llm_engine)
        assert len(session.steps()) == 1


def test_attach_to_an_engine_without_stats_says_why_and_what_to_do():
    with fake_vllm() as vllm:
        before = vllm.originals()
        with pytest.raises(StatsOffError) as error:
            kvhook.attach(vllm.engine(log_stats=False))
        assert vllm.originals() == before
    assert "cannot be changed any more" in str(error.value)
    assert "kvhook.install() before LLM" in str(error.value)
    assert "disable_log_stats=False" in str(error.value)


@pytest.mark.parametrize("what", [None, "llm", 5, object()])
def test_attach_to_what_is_no_engine_says_what_it_takes(what: Any):
    with pytest.raises(kvhook.KvhookError, match=r"takes a vllm\.LLM or its llm_engine"):
        kvhook.attach(what)


def test_an_engine_that_was_recorded_by_an_earlier_session_can_be_attached():
    with fake_vllm() as vllm:
        with kvhook.install() as first:
            engine = vllm.engine(log_stats=True)
            play(engine)
        second = kvhook.attach(engine)
        play(engine, 2)
        assert (len(first.steps()), len(second.steps())) == (1, 2)
