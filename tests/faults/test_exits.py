"""Signals, exits, forks and many engines: what a program does with its process, kvhook survives with what it has."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kvhook
from kvhook.cli import main
from tests.conftest import ROOT
from tests.standin import fake_vllm, step_stats

pytestmark = pytest.mark.usefixtures("fresh")

OUTPUT = ["output of the step"]

#: Makes an engine that kvhook records into run.kvh, and steps it.
BEGIN = """
import os, signal, sys, threading, time
import kvhook
from tests.standin import fake_vllm, step_stats
context = fake_vllm()
vllm = context.__enter__()
session = kvhook.install(ring_slots=1024, core="off", trace="run.kvh")
engine = vllm.engine()
def steps(count):
    for _ in range(count):
        engine.plan.append(step_stats(generated=1))
        engine.step()
"""


def run(code: str, folder: Path, expected: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == expected, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def recovered(path: Path) -> int:
    """How many steps there are once `kvhook recover` has been at work."""
    assert main(["recover", str(path)]) == 0
    return len(kvhook.open(path).steps())


@pytest.fixture
def minds_ctrl_c() -> Iterator[None]:
    """A program that a script starts in the background ignores SIGINT, and so do the tests there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("minds_ctrl_c")
def test_ctrl_c_in_the_middle_of_a_step_is_the_users_and_the_next_step_is_recorded():
    with fake_vllm() as vllm, kvhook.install(ring_slots=64, core="off") as session:
        engine = vllm.engine()
        record = engine.logger_manager.record

        def interrupted(*args: Any, **kwargs: Any) -> Any:
            signal.raise_signal(signal.SIGINT)
            return record(*args, **kwargs)

        engine.logger_manager.record = interrupted
        engine.plan += [step_stats(generated=1), step_stats(generated=1)]
        with pytest.raises(KeyboardInterrupt):
            engine.step()
        engine.logger_manager.record = record
        assert engine.step() == OUTPUT
        assert session.steps()["num_generation_tokens"].tolist()[-1] == 1
        assert session.health().ok


def test_sigterm_leaves_every_step_to_be_recovered(fresh: Path):
    run("steps(50)\nos.kill(os.getpid(), signal.SIGTERM)\n", fresh, -signal.SIGTERM)
    assert recovered(fresh / "run.kvh") == 50


def test_an_exit_with_engine_spool_and_readers_alive_is_quiet_and_the_trace_is_complete(fresh: Path):
    """SIGTERM with a handler that calls ``sys.exit``, as servers have it; an `on_step` function is at work, and threads
    read the session and the ring."""
    code = """
from kvhook.ring.reader import RingReader
got = []
session.on_step(got.extend, every=0.01)
def read():
    reader = RingReader(session.rings[0])
    while True:
        reader.poll(); session.health(); time.sleep(0.01)
for _ in range(2):
    threading.Thread(target=read, daemon=True).start()
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
steps(300)
os.kill(os.getpid(), signal.SIGTERM)
steps(10 ** 9)
"""
    done = run(code, fresh, 3)
    assert done.stderr == ""
    trace = kvhook.open(fresh / "run.kvh")
    assert len(trace.steps()) >= 300
    assert trace.meta["records_lost"] == 0


def test_a_fork_from_a_thread_in_mid_run_harms_neither(fresh: Path):
    code = """
pids = []
def fork():
    for _ in range(3):
        pid = os.fork()
        if not pid:
            other = vllm.engine()
            other.plan.append(step_stats(generated=1))
            os._exit(0 if other.step() == ["output of the step"] else 1)
        pids.append(pid)
thread = threading.Thread(target=fork)
thread.start()
while thread.is_alive():
    steps(1)
steps(20)
assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]
numbers = session.steps()["step"].tolist()
assert sorted(set(numbers)) == numbers
assert len(numbers) + session.meta["records_lost"] == numbers[-1] + 1
"""
    run(code, fresh)
    trace = kvhook.open(fresh / "run.kvh")
    steps = trace.steps()["step"].tolist()
    assert sorted(set(steps)) == steps
    # where other programs keep the thread that empties the ring from running, the ring is overrun: that is counted
    assert len(steps) + trace.meta["records_lost"] == steps[-1] + 1
    assert len(steps) >= 20


def test_an_exec_leaves_every_step_to_be_recovered(fresh: Path):
    """The process goes on as another program, without an end of this one."""
    run("steps(50)\nos.execv(sys.executable, [sys.executable, '-c', 'pass'])\n", fresh)
    assert recovered(fresh / "run.kvh") == 50


def test_sys_exit_in_a_function_of_on_step_ends_that_function_and_nothing_else():
    called: list[int] = []
    done = threading.Event()

    def leave(steps: list[Any]) -> None:
        called.append(len(steps))
        done.set()
        sys.exit(1)

    with fake_vllm() as vllm, kvhook.install(ring_slots=64, core="off") as session:
        session.on_step(leave, every=0.01)
        engine = vllm.engine()
        engine.plan += [step_stats() for _ in range(8)]
        engine.step()
        assert done.wait(30)
        assert [engine.step() for _ in range(7)] == [OUTPUT] * 7
        assert len(session.steps()) == 8
        (seam,) = session.health().seams
        assert (seam.where, seam.errors) == ("a function of on_step", 1)
        assert "sys.exit()" in seam.then
    assert called == [1]


def state(rings: Path) -> dict[str, int]:
    gc.collect()
    maps = Path("/proc/self/maps").read_text()
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "files": len(list(rings.iterdir())),
        "maps of rings": maps.count(str(rings)),
    }


def test_two_hundred_engines_leave_nothing_behind(fresh: Path):
    """Files, descriptors, threads and maps after 220 engines are those after 20; objects of kvhook's stay few."""
    with fake_vllm() as vllm, kvhook.install(ring_slots=64, core="off") as session:

        def engines(count: int) -> None:
            for _ in range(count):
                engine = vllm.engine()
                engine.plan.append(step_stats(generated=1))
                engine.step()
                del engine
            assert session.health().ok

        engines(20)
        before, objects = state(fresh / "rings"), len(gc.get_objects())
        engines(200)
        after = state(fresh / "rings")
        grown = len(gc.get_objects()) - objects
        assert len(session.steps()) == 220
    assert after == before
    assert grown < 200 * 150, "what is told of an engine stays: its facts, and no more"


def test_a_step_may_take_as_long_as_it_likes_in_another_thread_while_kvhook_is_uninstalled():
    begun, go_on = threading.Event(), threading.Event()
    with fake_vllm() as vllm:
        session = kvhook.install(ring_slots=64, core="off")
        engine = vllm.engine()
        record = engine.logger_manager.record

        def slow(*args: Any, **kwargs: Any) -> Any:
            begun.set()
            assert go_on.wait(30)
            return record(*args, **kwargs)

        engine.logger_manager.record = slow
        engine.plan.append(step_stats(generated=1))
        given: list[Any] = []
        thread = threading.Thread(target=lambda: given.append(engine.step()))
        thread.start()
        assert begun.wait(30)
        kvhook.uninstall()
        go_on.set()
        thread.join(30)
        assert given == [OUTPUT]
        assert session.faults == {}
