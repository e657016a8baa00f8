"""The summary of a running session is that of its file, to the last digit, whatever happened in the run, and whenever
it is asked for."""

from __future__ import annotations

import json
import os
import random
import threading
from pathlib import Path
from typing import Any

import pytest

import kvhook
from kvhook.recording.running import Running, summary_so_far
from kvhook.ring.reader import RingReader
from kvhook.ring.trace_file import TraceWriter
from kvhook.trace import open_files
from tests.ring.synthetic import LAYOUT, Recording
from tests.standin import NO_STATS, fake_vllm, step_stats

DATA = Path(__file__).parent / "data"


def invented(rng: random.Random) -> Any:
    """What one step brings; now and then nothing."""
    if rng.random() < 0.1:
        return NO_STATS
    finished = [
        {
            "request_id": str(rng.randrange(50)),
            "finish_reason": rng.randrange(5),
            "num_prompt_tokens": rng.randrange(1, 300),
            "num_generation_tokens": rng.choice([0, 1, 30]),
            "num_cached_tokens": rng.randrange(0, 64),
            "e2e_latency": rng.random(),
            "mean_time_per_output_token": rng.random(),
        }
        for _ in range(rng.choice([0, 0, 1, 3]))
    ]
    return step_stats(
        num_running_reqs=rng.randrange(9),
        num_waiting_reqs=rng.randrange(3),
        kv_cache_usage=rng.randrange(60) / 59,
        prefix={"queries": 100, "hits": 16 * rng.randrange(4)},
        prompt={"total": 100, "computed": 60, "cached_tokens": 40},
        generated=rng.randrange(9),
        preempted=rng.randrange(2),
        itl=[rng.random() for _ in range(rng.choice([0, 1, 2, 9]))],
        ttft=[rng.random() for _ in range(rng.choice([0, 0, 3]))],
        finished=finished,
    )


def work(engine: Any, steps: int, rng: random.Random) -> None:
    for _ in range(steps):
        engine.plan.append(invented(rng))
        engine.step()


def as_read(session: kvhook.Session, engine: int | None = None) -> dict[str, Any]:
    """What reading the whole run gives."""
    return session.trace().summary(engine).as_dict()


@pytest.mark.parametrize("seed", range(4))
def test_it_is_that_of_the_files_at_any_moment(fresh: Path, seed: int):
    rng = random.Random(seed)
    with fake_vllm() as vllm, kvhook.install(trace=fresh / "run.kvh") as session:
        engines = [vllm.engine(num_gpu_blocks=60), vllm.engine(log_stats=True)]
        for _ in range(12):
            work(rng.choice(engines), rng.choice([1, 7, 300]), rng)
            assert session.summary().as_dict() == as_read(session)
            assert session.summary(1).as_dict() == as_read(session, 1)
    last = session.summary().as_dict()
    assert last == as_read(session)
    of_the_file = kvhook.open(session.files[0]).summary().as_dict()
    assert last == of_the_file


def test_what_falls_out_of_a_bounded_history_is_in_neither(fresh: Path):
    rng = random.Random(5)
    with fake_vllm() as vllm, kvhook.install(history=1 << 20) as session:
        engine = vllm.engine()
        for _ in range(8):
            work(engine, 700, rng)
            assert session.summary().as_dict() == as_read(session)
        assert session.summary().records_dropped > 0


def test_lost_records_are_counted(fresh: Path):
    rng = random.Random(6)
    with fake_vllm() as vllm, kvhook.install(ring_slots=64) as session:
        engine = vllm.engine()
        with session._spool._lock:  # the spool cannot keep up
            work(engine, 500, rng)
        assert session.summary().as_dict() == as_read(session)
        assert session.summary().records_lost > 0


@pytest.mark.parametrize("path", sorted(DATA.glob("*.kvh")), ids=lambda path: path.stem)
def test_it_is_that_of_real_files_of_each_level_while_they_grow(fresh: Path, path: Path):
    data = path.read_bytes()
    growing = fresh / "growing.kvh"
    growing.write_bytes(data[:8192])
    running = Running(lambda: ([growing], [os.open(growing, os.O_RDONLY)], {}))
    for end in range(8192, len(data) + 4000, 4000):
        growing.write_bytes(data[:end])
        summary = running.ask(lambda so_far: summary_so_far(so_far, None), str(growing), {})
        assert summary is not None
        assert summary.as_dict() == kvhook.open(growing).summary().as_dict()


def test_samples_of_one_prompt_that_may_lie_in_two_files_are_left_to_who_reads_them(fresh: Path):
    recording = Recording(fresh / "rings")
    for n in range(8):
        recording.finish(n // 4, sample_index=n % 4, num_cached_tokens=32 * (n % 4))
        recording.step()
    with RingReader(recording.path, 0) as reader:
        slots = reader.poll().slots
    paths = [fresh / "a.kvh", fresh / "b.kvh"]
    for path, half in zip(paths, (slots[:5], slots[5:]), strict=True):
        writer = TraceWriter(path, LAYOUT, recording.meta)
        writer.append_meta(0, recording.meta)
        writer.append(half)
        writer.close()
    running = Running(lambda: (paths, [os.open(path, os.O_RDONLY) for path in paths], {}))
    assert running.ask(lambda so_far: summary_so_far(so_far, None), "run", {}) is None
    assert open_files(paths, "run").summary().sibling_hits == (2, 2 * (32 + 64 + 96), 0)


def test_several_threads_may_ask_while_the_engine_works(fresh: Path):
    rng, stop, faults = random.Random(8), threading.Event(), []
    with fake_vllm() as vllm, kvhook.install() as session:
        engine = vllm.engine()

        def ask() -> None:
            before = 0
            while not stop.is_set():
                steps = session.summary().steps
                if steps < before:
                    faults.append((before, steps))
                before = steps

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        work(engine, 3000, rng)
        stop.set()
        for thread in threads:
            thread.join()
        assert session.summary().as_dict() == as_read(session)
        assert session.summary().steps == 3000
    assert not faults
    assert session.faults == {}


def test_the_spools_thread_adds_up_without_being_asked(fresh: Path):
    with fake_vllm() as vllm, kvhook.install() as session:
        engine = vllm.engine()
        for seed in range(3):  # 9,000 at once are more than the ring holds, if the spool's thread gets no time
            work(engine, 3000, random.Random(seed))
            session._spool.drain()
        session._spool._add_up(9000)
        (file,) = session._running["it"]._files.values()
        assert file._taken > 9000


def test_a_session_that_has_recorded_nothing_says_why(fresh: Path):
    with kvhook.install() as session:
        assert session.summary().steps == 0
        assert session.summary().why_no_steps
    assert open_files([], "nothing").summary().steps == 0


def test_the_trace_of_a_session_is_what_it_was_when_it_was_asked_for(fresh: Path):
    with fake_vllm() as vllm, kvhook.install() as session:
        engine = vllm.engine()
        work(engine, 10, random.Random(1))
        trace = session.trace()
        work(engine, 10, random.Random(2))
        assert trace.summary().steps == 10
        assert json.dumps(session.summary().as_dict())
        assert session.summary().steps == 20
