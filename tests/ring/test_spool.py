"""The spool: what is published is on disk soon, and whatever happens to the disk is counted and harms nobody."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

import kvhook
from kvhook.errors import KvhookError
from kvhook.recording.pauses import INTERVAL, LONGEST, SHORTEST, next_pause
from kvhook.recording.spool import BATCH, Spool
from kvhook.ring.layout import CLOSED
from kvhook.ring.trace_file import TraceWriter
from kvhook.trace import open_trace
from tests.conftest import Python
from tests.ring.synthetic import Recording
from tests.standin import fake_vllm, step_stats


class Faults(list):
    """Takes what a spool reports."""

    def __call__(self, where: str, error: BaseException, then: str) -> None:
        self.append((where, str(error), then))


class Recorder:
    """As much of a recorder as a spool looks at."""

    def __init__(self, recording: Recording) -> None:
        self.number, self.ring, self.meta = recording.engine, recording.ring, recording.meta

    def close(self) -> None:
        self.ring.close()


def spool_of(recording: Recording, path: Path, limit: int | None = None) -> tuple[Spool, Faults]:
    faults = Faults()
    spool = Spool(lambda n: [path if not n else path.with_name(f"{path.stem}-{n + 1}.kvh")], limit, faults)
    spool.add(Recorder(recording))
    return spool, faults


def test_a_step_is_in_the_file_within_a_second_without_anybody_asking(tmp_path: Path):
    recording = Recording(tmp_path / "r")
    spool, faults = spool_of(recording, tmp_path / "run.kvh")
    waits = []
    for n in range(4):
        recording.step()
        start = time.monotonic()
        while len(open_trace(tmp_path / "run.kvh").steps()) <= n and time.monotonic() - start < 20:
            time.sleep(0.01)
        waits.append(time.monotonic() - start)
    spool.close()
    assert min(waits) < LONGEST + 0.2
    assert max(waits) < 5, "a busy machine may be late, but not for ever"
    assert faults == []


@pytest.mark.parametrize(
    ("taken", "seconds", "last", "pause"),
    [
        (0, 0.2, 0.2, INTERVAL),  # idle
        (0, 1.0, 1.0, INTERVAL),
        (100, 0.2, 0.2, 0.4),  # 500 a second: longer, step by step
        (400, 0.8, 0.8, LONGEST),
        (4096, 1.0, 1.0, 0.25),  # an eighth of the ring takes a quarter of a second
        (8000, 0.2, 0.2, 0.0256),
        (100_000, 0.2, 0.2, SHORTEST),
    ],
)
def test_how_long_the_spool_rests(taken: int, seconds: float, last: float, pause: float):
    assert next_pause(taken, seconds, 8192, last) == pytest.approx(pause)


def test_the_file_is_complete_and_says_so_after_the_end(tmp_path: Path):
    recording = Recording(tmp_path / "r").run(5)
    spool, _ = spool_of(recording, tmp_path / "run.kvh")
    assert open_trace(tmp_path / "run.kvh").header.state != CLOSED  # type: ignore[union-attr]
    spool.close()
    trace = open_trace(tmp_path / "run.kvh")
    assert trace.header is not None
    assert trace.header.state == CLOSED
    assert len(trace.steps()) == 5
    assert trace.meta["engines"][0]["records_published"] == 5


def test_more_than_a_batch_is_taken_in_order(tmp_path: Path):
    recording = Recording(tmp_path / "r", slots=1 << 14)
    spool, _ = spool_of(recording, tmp_path / "run.kvh")
    with spool._lock:
        recording.run(2 * BATCH + 100)
    assert spool.drain() in (0, 2 * BATCH + 100)  # its thread may have been quicker
    spool.close()
    assert open_trace(tmp_path / "run.kvh").steps()["step"].tolist() == list(range(2 * BATCH + 100))


@pytest.mark.parametrize("what", ["directory", "file"])
def test_what_vanishes_is_counted_reported_once_and_harms_nobody(
    fresh: Path, what: str, caplog: pytest.LogCaptureFixture
):
    folder = fresh / "out"
    folder.mkdir()
    with fake_vllm() as vllm:
        session = kvhook.install(trace=folder / "run.kvh")
        engine = vllm.engine()

        def play(first: int, count: int) -> None:
            for n in range(first, first + count):
                engine.plan.append(step_stats(generated=n))
                assert engine.step() == ["output of the step"]
            session.trace()

        play(0, 10)
        if what == "directory":
            shutil.rmtree(folder)
        else:
            (folder / "run.kvh").unlink()
        play(10, 5)
        play(15, 5)
        summary = session.summary()
        assert summary.steps == 10, "what was recorded before is still there"
        assert summary.records_lost == 10
        assert list(session.faults) == ["writing the trace"]
        kvhook.uninstall()
    said = [r.getMessage() for r in caplog.records if "writing the trace failed" in r.getMessage()]
    assert len(said) == 1
    assert "has been removed" in said[0]
    assert "The engine is not affected" in said[0]
    with pytest.raises(KvhookError, match=r"what was recorded is gone: .*run\.kvh: No such file"):
        session.summary()


def test_a_ring_directory_that_vanishes_does_not_matter_to_the_recording(fresh: Path):
    with fake_vllm() as vllm:
        session = kvhook.install(ring_dir=fresh / "r")
        engine = vllm.engine()
        shutil.rmtree(fresh / "r")
        engine.plan.append(step_stats(generated=3))
        engine.step()
        assert session.steps()["num_generation_tokens"].tolist() == [3]
        another = vllm.engine()  # its ring cannot be made: it goes unrecorded, and works
        another.plan.append(step_stats())
        assert another.step() == ["output of the step"]
        assert list(session.faults) == ["starting to record an engine"]
        kvhook.uninstall()


def test_the_file_gives_what_the_live_session_gave(fresh: Path):
    with fake_vllm() as vllm:
        session = kvhook.install(trace=fresh / "run.kvh")
        one, two = vllm.engine(), vllm.engine()
        for n, engine in enumerate([one, two, one, two, one]):
            engine.plan.append(
                step_stats(
                    generated=n,
                    kv_cache_usage=n / 10,
                    itl=[0.1, 0.2, 0.4][: n + 1],
                    finished=[{"num_prompt_tokens": n}],
                )
            )
            engine.step()
        live = session.trace()
        kvhook.uninstall()
    trace = kvhook.open(fresh / "run.kvh")
    for table in ("steps", "requests"):
        for engine in (None, 0, 1):
            one_table, other = getattr(trace, table)(engine), getattr(live, table)(engine)
            assert one_table.dtype == other.dtype
            assert one_table.tobytes() == other.tobytes()
    for series in ("time_to_first_token", "inter_token_latency"):
        assert [x.tolist() for x in trace.latencies(series)] == [x.tolist() for x in live.latencies(series)]
    assert trace.summary().as_dict() == live.summary().as_dict()
    # what only the session knows: its faults, and how long a hook's call takes
    assert trace.meta.keys() == live.meta.keys() - {"faults", "hook_call_ns"}
    assert {k: v for k, v in trace.meta.items() if k != "name"} == {k: live.meta[k] for k in trace.meta if k != "name"}


def test_facts_that_did_not_fit_on_a_full_disk_come_when_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    append, full = TraceWriter.append, [True]

    def may_be_full(writer: TraceWriter, slots: Any) -> None:
        if full[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(writer, slots)

    monkeypatch.setattr(TraceWriter, "append", may_be_full)
    recording = Recording(tmp_path / "r").run(4)
    spool, faults = spool_of(recording, tmp_path / "run.kvh")
    spool.drain()
    full[0] = False
    recording.run(3)
    spool.drain()
    spool.close()
    trace = open_trace(tmp_path / "run.kvh")
    assert trace.steps()["step"].tolist() == [4, 5, 6]
    assert trace.summary().model == "tiny-llama"
    assert (trace.summary().records_lost, trace.summary().records_dropped) == (4, 0)
    assert {where for where, _, _ in faults} == {"writing the trace"}


def test_what_a_full_disk_took_of_a_batch_counts_as_written(tmp_path: Path, python: Python):
    code = """
import json, resource, sys
from pathlib import Path
from tests.ring.synthetic import LAYOUT, Recording
from tests.ring.test_spool import spool_of
from kvhook.trace import open_trace
recording = Recording(Path("r"), slots=64)
spool, faults = spool_of(recording, Path("run.kvh"))
with spool._lock:
    room = spool._files.files[0].size + 10 * LAYOUT.slot_bytes + 100
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    recording.run(30)
spool.drain()
full = open_trace(Path("run.kvh"))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
recording.run(5)
spool.drain()
spool.close()
trace = open_trace(Path("run.kvh"))
summary = trace.summary()
print(json.dumps([full.steps()["step"].tolist(), trace.steps()["step"].tolist(), summary.records_lost, trace.damaged]))
"""
    full, steps, lost, damaged = json.loads(python(code).stdout)
    assert full == list(range(10))
    assert steps == [*range(10), *range(30, 35)]
    assert (lost, damaged) == (20, 0)


def test_a_trace_whose_process_was_killed_is_recovered(tmp_path: Path, python: Python):
    code = """
import os, signal, sys
import kvhook
from tests.standin import fake_vllm, step_stats
with fake_vllm() as vllm:
    session = kvhook.install(trace="run.kvh")
    engine = vllm.engine()
    engine.plan += [step_stats(generated=n) for n in range(500)]
    for _ in range(200):
        engine.step()
    session.trace()
    session._spool._lock.acquire()  # the spool does not come again
    for _ in range(300):
        engine.step()
    os._exit(0)
"""
    from kvhook.discovery.recovery import recover
    from kvhook.trace import open_files

    python(code)
    path = tmp_path / "run.kvh"
    assert len(open_files([path], "the file alone").steps()) == 200
    # the header of the file says where the ring is
    assert kvhook.open(path).steps()["num_generation_tokens"].tolist() == list(range(500))
    done = recover(path, [tmp_path / "rings"])
    assert done.added == {0: 300}
    assert kvhook.open(path).steps()["num_generation_tokens"].tolist() == list(range(500))
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".part")]
