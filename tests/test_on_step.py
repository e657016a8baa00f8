"""`kvhook.on_step`: every step reaches the function, off the engine's thread; what it cannot take is counted."""

from __future__ import annotations

import asyncio
import functools
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kvhook
from kvhook.errors import KvhookError
from kvhook.recording import subscription as subscriptions
from tests.conftest import ROOT
from tests.standin import NO_STATS, fake_vllm, step_stats


def run(engine: Any, steps: int, first: int = 0) -> None:
    for n in range(first, first + steps):
        engine.plan.append(step_stats(kv_cache_usage=0.5, num_running_reqs=n, generated=n))
        engine.step()


def test_every_step_comes_once_and_in_order_on_another_thread(fresh: Path):
    got: list[dict[str, Any]] = []
    threads = set()

    def take(steps: list[dict[str, Any]]) -> None:
        threads.add(threading.current_thread())
        got.extend(steps)

    with fake_vllm() as vllm:
        subscription = kvhook.on_step(take, every=0.001)
        begin = time.time()
        engines = [vllm.engine(), vllm.engine()]
        for engine in engines:
            run(engine, 300)
        subscription.close()
    for number in (0, 1):
        mine = [row for row in got if row["engine"] == number]
        assert [row["step"] for row in mine] == list(range(300))
        assert [row["num_generation_tokens"] for row in mine] == list(range(300))
        assert {row["kv_cache_usage"] for row in mine} == {0.5}
    assert all(begin - 1 < row["time"] < time.time() + 1 for row in got)
    assert (subscription.steps, subscription.dropped) == (600, 0)
    assert threading.current_thread() not in threads


def test_it_begins_with_the_next_step_and_what_is_left_comes_when_the_recording_ends(fresh: Path):
    got: list[int] = []
    with fake_vllm() as vllm, kvhook.install() as session:
        engine = vllm.engine()
        run(engine, 5)
        session.trace()  # all that was done is in the ring by now
        session.on_step(lambda steps: got.extend(step["step"] for step in steps), every=3600)
        run(engine, 3, first=5)
    assert got == [5, 6, 7]


def test_what_is_not_known_is_none(fresh: Path):
    got: list[dict[str, Any]] = []
    with fake_vllm() as vllm, kvhook.install() as session:
        session.on_step(got.extend, every=3600)
        engine = vllm.engine()
        engine.plan.append(NO_STATS)
        engine.step()
    assert [(row["kv_cache_usage"], row["num_running_reqs"], row["num_generation_tokens"]) for row in got] == [
        (None, None, 0)
    ]


class Waits:
    """A function for `on_step` that notes the steps it gets, and returns when it is told to."""

    def __init__(self) -> None:
        self.got: list[int] = []
        self.begun, self.go_on = threading.Event(), threading.Event()

    def __call__(self, steps: list[dict[str, Any]]) -> None:
        self.got.extend(step["step"] for step in steps)
        self.begun.set()
        self.go_on.wait(60)


def test_a_slow_function_costs_records_that_are_counted_and_no_step_waits_for_it(fresh: Path):
    slow = Waits()
    with fake_vllm() as vllm:
        session = kvhook.install(ring_slots=64)
        subscription = session.on_step(slow, every=0.001)
        engine = vllm.engine()
        run(engine, 1)
        session.trace()
        assert slow.begun.wait(60)
        run(engine, 500, first=1)
        session.trace()
        slow.go_on.set()
        subscription.close()
    assert slow.got[0] == 0
    assert slow.got[-1] == 500
    assert slow.got == sorted(set(slow.got))
    assert len(slow.got) + subscription.dropped == 501
    assert subscription.dropped > 400


def test_an_exception_in_the_function_is_counted_and_it_is_called_again(fresh: Path, caplog: pytest.LogCaptureFixture):
    calls: list[int] = []
    again = threading.Event()

    def fails(steps: list[dict[str, Any]]) -> None:
        calls.append(len(steps))
        again.set()
        raise ValueError("no network")

    with fake_vllm() as vllm, kvhook.install() as session:
        session.on_step(fails, every=0.001)
        engine = vllm.engine()
        for n in range(2):
            again.clear()
            run(engine, 1, first=n)
            session.trace()
            assert again.wait(60)
    assert sum(calls) == 2
    assert session.faults == {"a function of on_step": len(calls)}
    assert caplog.text.count("no network") == 1


def test_what_comes_after_sys_exit_in_the_function_is_counted_as_dropped(fresh: Path, caplog: pytest.LogCaptureFixture):
    ended = threading.Event()
    got: list[int] = []

    def once(steps: list[dict[str, Any]]) -> None:
        got.extend(step["step"] for step in steps)
        ended.set()
        sys.exit(3)

    with fake_vllm() as vllm, kvhook.install() as session:
        subscription = session.on_step(once, every=0.001)
        engine = vllm.engine()
        run(engine, 1)
        session.trace()
        assert ended.wait(60)
        run(engine, 200, first=1)
        run(vllm.engine(), 50)  # an engine that it has not seen
    assert got == list(range(len(got)))
    assert (subscription.steps, subscription.dropped) == (len(got), 251 - len(got))
    assert session.faults == {"a function of on_step": 1}
    assert caplog.text.count("later steps are counted as dropped") == 1


def test_closing_from_inside_the_function_and_closing_twice_is_fine(fresh: Path):
    done = threading.Event()
    with fake_vllm() as vllm, kvhook.install() as session:

        def once(steps: list[dict[str, Any]]) -> None:
            subscription.close()
            done.set()

        subscription = session.on_step(once, every=0.001)
        run(vllm.engine(), 2)
        session.trace()
        assert done.wait(60)
        subscription.close()
    assert session.faults == {}


@pytest.mark.parametrize(
    "arguments", [{"callback": 3}, {"callback": print, "every": 0}, {"callback": print, "every": -1}]
)
def test_arguments_are_checked(fresh: Path, arguments: dict[str, Any]):
    with pytest.raises(KvhookError):
        kvhook.on_step(**arguments)


def test_a_closed_session_takes_no_function(fresh: Path):
    session = kvhook.install()
    session.close()
    with pytest.raises(KvhookError, match="is closed"):
        session.on_step(print)


def test_what_a_function_that_does_not_return_did_not_get_is_counted_and_said(
    fresh: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(subscriptions, "PATIENCE", 0.2)
    blocks = Waits()
    with fake_vllm() as vllm:
        session = kvhook.install()
        subscription = session.on_step(blocks, every=0.001)
        engine = vllm.engine()
        run(engine, 1)
        session.trace()
        assert blocks.begun.wait(60)
        run(engine, 400, first=1)
        run(vllm.engine(), 50)  # an engine that the subscription has not looked at yet
        kvhook.uninstall()
        made = len(session.steps())
        said = (subscription.steps, subscription.dropped)
        health = session.health()
        blocks.go_on.set()
        subscription._thread.join(60)
    assert made == 451
    assert said == (len(blocks.got), 451 - len(blocks.got))
    assert (subscription.steps, subscription.dropped) == said, "what was said is final: it gets nothing afterwards"
    assert session.faults == {"handing all steps to a function of on_step": 1}
    assert not health.ok
    assert f"did not get {451 - len(blocks.got)} of the records" in str(health)
    assert caplog.text.count(f"did not get {451 - len(blocks.got)} of the records") == 1


BLOCKS_AT_THE_END = """
import threading
import kvhook
from kvhook.recording import subscription
from tests.standin import fake_vllm, step_stats

subscription.PATIENCE = 0.2
begun = threading.Event()

def blocks(steps):
    begun.set()
    threading.Event().wait()

with fake_vllm() as vllm:
    session = kvhook.install()
    session.on_step(blocks, every=0.001)
    engine = vllm.engine()
    for n in range(101):
        engine.plan.append(step_stats(kv_cache_usage=0.5, num_running_reqs=1, generated=1))
        engine.step()
        if not n:
            session.trace()
            assert begun.wait(60)
    session.trace()
"""


def test_a_program_that_ends_says_what_was_not_handed_over():
    """No step waits in the ring when the first one has been handed over, so that it is the other hundred."""
    done = subprocess.run(
        [sys.executable, "-c", BLOCKS_AT_THE_END], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "did not get 100 of the records" in done.stderr


def test_records_that_a_slow_function_lost_are_said_when_it_ends(fresh: Path, caplog: pytest.LogCaptureFixture):
    begun, go_on = threading.Event(), threading.Event()

    def slow(steps: list[dict[str, Any]]) -> None:
        begun.set()
        go_on.wait(60)

    with fake_vllm() as vllm, kvhook.install(ring_slots=64) as session:
        subscription = session.on_step(slow, every=0.001)
        engine = vllm.engine()
        run(engine, 1)
        session.trace()
        assert begun.wait(60)
        run(engine, 500, first=1)
        go_on.set()
    assert subscription.steps + subscription.dropped == 501
    assert f"did not get {subscription.dropped} of the records" in caplog.text
    assert "still busy" not in caplog.text


class Sends:
    async def send(self, steps: list[dict[str, Any]]) -> None: ...

    async def __call__(self, steps: list[dict[str, Any]]) -> None: ...


async def sends(steps: list[dict[str, Any]]) -> None: ...


def yields(steps: list[dict[str, Any]]) -> Any:
    yield from steps


async def yields_later(steps: list[dict[str, Any]]) -> Any:
    yield steps


@pytest.mark.parametrize(
    "callback",
    [sends, Sends().send, Sends(), functools.partial(sends), yields, yields_later, Sends, dict, None, "print"],
)
def test_what_would_not_be_run_is_refused_with_what_to_do(fresh: Path, callback: Any):
    session = kvhook.install()
    with pytest.raises(KvhookError, match="takes a function that is called with a list of steps, not"):
        session.on_step(callback)
    kvhook.uninstall()
    assert session.faults == {}


@pytest.mark.parametrize("returns", [sends, yields, yields_later], ids=["coroutine", "generator", "async generator"])
def test_a_function_that_returns_what_nobody_runs_got_no_steps(
    fresh: Path, caplog: pytest.LogCaptureFixture, returns: Callable[[Any], Any]
):
    with fake_vllm() as vllm, kvhook.install() as session:
        subscription = session.on_step(lambda steps: returns(steps), every=0.001)
        run(vllm.engine(), 30)
    assert (subscription.steps, subscription.dropped) == (0, 30)
    assert session.faults == {"a function of on_step": 1}
    assert "asyncio.run_coroutine_threadsafe" in caplog.text


def test_steps_can_be_handed_to_an_event_loop_as_the_message_says(fresh: Path):
    got: list[int] = []

    async def send(steps: list[dict[str, Any]]) -> None:
        got.extend(step["step"] for step in steps)

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    with fake_vllm() as vllm, kvhook.install() as session:
        subscription = session.on_step(lambda steps: asyncio.run_coroutine_threadsafe(send(steps), loop), every=0.001)
        run(vllm.engine(), 30)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(60)
    loop.close()
    assert got == list(range(30))
    assert (subscription.steps, subscription.dropped, session.faults) == (30, 0, {})
