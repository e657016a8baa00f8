"""What goes wrong in the spool but for the disk: no thread, no memory, a signal. Nothing is lost that the ring
still holds, nothing is written twice, and the end of the recording is an end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kvhook
from kvhook.demo.live import LiveLines
from kvhook.errors import KvhookError
from kvhook.ring import trace_file
from kvhook.ring.layout import CLOSED
from kvhook.ring.reader import RingReader
from kvhook.ring.trace_file import TraceWriter, header_of
from kvhook.trace import open_trace
from tests.collector.sources import polled
from tests.ring.synthetic import Recording
from tests.ring.test_spool import spool_of
from tests.standin import fake_vllm, step_stats


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """No thread can be started, until what this gives is called."""

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    return monkeypatch.undo


def play(engine: Any, count: int) -> None:
    engine.plan += [step_stats() for _ in range(count)]
    for _ in range(count):
        engine.step()


def sampled_by(collector: kvhook.VLLMMetricsCollector) -> threading.Thread | None:
    return collector.sampling_thread


def of_spool() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "kvhook-spool"]


STARTING = "starting the thread that writes the trace"


# No thread


def test_without_a_thread_the_end_writes_what_the_ring_holds(fresh: Path, no_threads: Any, caplog: Any):
    with fake_vllm() as vllm:
        session = kvhook.install(trace=fresh / "run.kvh", core="off")
        engines = [vllm.engine(), vllm.engine()]
        for engine in engines:
            play(engine, 20)
        kvhook.uninstall()
    assert session.is_closed
    assert session.faults == {STARTING: 2}
    assert len([r for r in caplog.records if STARTING in r.getMessage()]) == 1
    assert header_of(fresh / "run.kvh").state == CLOSED
    trace = kvhook.open(fresh / "run.kvh")
    assert [len(trace.steps(number)) for number in (0, 1)] == [20, 20]
    assert trace.meta["records_lost"] == 0


@pytest.mark.parametrize("who", ["engine", "reader"])
def test_the_thread_is_started_by_the_next_who_comes(fresh: Path, no_threads: Any, who: str):
    before = len(of_spool())
    with fake_vllm() as vllm, kvhook.install(core="off") as session:
        vllm.engine()
        no_threads()
        assert len(of_spool()) == before
        if who == "engine":
            vllm.engine()
        else:
            session.steps()
        assert len(of_spool()) == before + 1
        session.steps()
        assert len(of_spool()) == before + 1
    assert len(of_spool()) == before


def test_on_step_says_that_it_has_no_thread(fresh: Path, no_threads: Any):
    with fake_vllm() as vllm, kvhook.install(core="off") as session:
        engine = vllm.engine()
        with pytest.raises(KvhookError, match="needs a thread of its own"):
            session.on_step(print)
        no_threads()
        play(engine, 3)
        assert len(session.steps()) == 3


def test_a_collector_without_a_thread_gets_one_when_it_is_asked(no_threads: Any):
    engine, collector = polled()
    collector.start_monitoring()
    assert (collector.monitoring, sampled_by(collector)) == (True, None)
    assert "starting the thread that samples" in str(collector.get_comprehensive_stats()["errors"])
    no_threads()
    collector.collect_current_stats()
    thread = sampled_by(collector)
    assert thread is not None
    assert thread.is_alive()
    collector.stop_monitoring()
    assert not thread.is_alive()
    assert engine is not None


def test_the_demo_goes_on_without_live_lines(tmp_path: Path, no_threads: Any):
    said: list[str] = []
    with LiveLines(tmp_path / "none.ring", said.append) as live:
        live.flush()
    assert said == ["(there are no live lines: can't start new thread)"]


# Errors while a batch is copied

ERRORS = [MemoryError, RuntimeError, ValueError, KeyboardInterrupt]


def failing(function: Callable[..., Any], error: type[BaseException], *, after: bool = False) -> Callable[..., Any]:
    """The function, but its first call raises: before anything is done, or when all is."""
    left = [1]

    def fails(*args: Any, **kwargs: Any) -> Any:
        if not left:
            return function(*args, **kwargs)
        left.clear()
        if after:
            function(*args, **kwargs)
        raise error

    return fails


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize(
    ("owner", "name", "after"),
    [
        (RingReader, "poll", False),
        (RingReader, "poll", True),
        (TraceWriter, "append", False),
        (TraceWriter, "append", True),
        (trace_file, "_write", False),
        (trace_file, "_write", True),
    ],
)
def test_a_batch_that_failed_is_written_once_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, after: bool, error: type[BaseException]
):
    recording = Recording(tmp_path / "r")
    spool, faults = spool_of(recording, tmp_path / "run.kvh")
    spool._background.end()  # nothing is copied but when this says so
    recording.run(5)
    spool.drain()
    recording.run(5)
    monkeypatch.setattr(owner, name, failing(getattr(owner, name), error, after=after))
    with pytest.raises(error):
        spool.drain()
    assert spool.counts()[0]["records_unwritten"] == 0
    recording.run(5)
    spool.drain()
    spool.close()
    trace = open_trace(tmp_path / "run.kvh")
    assert trace.steps()["step"].tolist() == list(range(15))
    assert (trace.meta["records_lost"], trace.damaged) == (0, 0)
    assert faults == []


@pytest.mark.parametrize("whole", [0, 1, 3, 5])
def test_what_was_written_of_a_batch_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: int):
    recording = Recording(tmp_path / "r")
    spool, _ = spool_of(recording, tmp_path / "run.kvh")
    spool._background.end()
    spool.drain()
    write = trace_file._write
    slot = spool._files.files[0].layout.slot_bytes

    def partly(fd: int, data: memoryview, at: int) -> None:
        write(fd, data[: min(len(data), whole * slot + 11)], at)
        raise MemoryError

    recording.run(5)
    with monkeypatch.context() as patch:
        patch.setattr(trace_file, "_write", partly)
        with pytest.raises(MemoryError):
            spool.drain()
    spool.close()
    trace = open_trace(tmp_path / "run.kvh")
    assert trace.steps()["step"].tolist() == list(range(5))
    assert (trace.meta["records_lost"], trace.damaged) == (0, 0)


def test_what_the_ring_no_longer_holds_by_then_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recording = Recording(tmp_path / "r", slots=16)
    spool, _ = spool_of(recording, tmp_path / "run.kvh")
    spool._background.end()
    recording.run(10)
    with monkeypatch.context() as patch:
        patch.setattr(TraceWriter, "append", failing(TraceWriter.append, MemoryError))
        with pytest.raises(MemoryError):
            spool.drain()
    recording.run(20)
    spool.drain()
    spool.close()
    trace = open_trace(tmp_path / "run.kvh")
    steps = trace.steps()["step"].tolist()
    assert steps == list(range(30 - len(steps), 30))
    assert trace.meta["records_lost"] == 30 - len(steps) > 0


def test_what_fails_up_to_the_end_is_lost_everywhere_alike(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with fake_vllm() as vllm:
        session = kvhook.install(trace=fresh / "run.kvh", core="off")
        engine = vllm.engine()
        play(engine, 10)
        session.steps()
        poll = RingReader.poll

        def fails(*args: Any, **kwargs: Any) -> Any:
            raise MemoryError

        with monkeypatch.context() as patch:
            patch.setattr(RingReader, "poll", fails)
            play(engine, 7)
            kvhook.uninstall()
    assert RingReader.poll is poll
    health = session.health()
    assert (health.records, health.records_lost) == (17, 7)
    trace = kvhook.open(fresh / "run.kvh")
    assert trace.header is not None
    assert trace.header.state == CLOSED
    for meta in (session.meta, trace.meta):
        assert meta["records_lost"] == 7
    assert session.summary().records_lost == trace.summary().records_lost == 7
    assert kvhook.cli.main(["doctor", str(fresh / "run.kvh")]) == 1
    assert "7 records" in capsys.readouterr().out


def test_one_ring_that_cannot_be_read_does_not_keep_the_others_from_being_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with fake_vllm() as vllm, kvhook.install(core="off", trace=tmp_path / "run.kvh") as session:
        engines = [vllm.engine(), vllm.engine()]
        bad = session._spool._engines[0].reader
        poll = RingReader.poll

        def fails(reader: RingReader, *args: Any, **kwargs: Any) -> Any:
            if reader is bad:
                raise MemoryError
            return poll(reader, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(RingReader, "poll", fails)
            for engine in engines:
                play(engine, 4)
            with pytest.raises(MemoryError):
                session.steps()
            assert len(kvhook.open(tmp_path / "run.kvh").steps(1)) == 4
        assert len(session.steps(0)) == 4


def test_an_engine_whose_ring_is_gone_before_it_is_read_is_let_go(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    def vanished(*args: Any) -> None:
        raise FileNotFoundError("the ring has vanished")

    with fake_vllm() as vllm, kvhook.install(core="off") as session:
        with monkeypatch.context() as patch:
            patch.setattr("kvhook.recording.spool.RingReader", vanished)
            play(vllm.engine(), 2)
        assert session.rings == []
        play(vllm.engine(), 3)
        assert session.health().engines == 1
        assert len(session.steps()) == 3
