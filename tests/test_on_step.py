"""`kvhook.on_step`: every step reaches the function, off the engine's thread; what it cannot take is counted."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

import kvhook
from kvhook.errors import KvhookError
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


def test_a_slow_function_costs_records_that_are_counted_and_no_step_waits_for_it(fresh: Path):
    begun, go_on = threading.Event(), threading.Event()
    got: list[int] = []

    def slow(steps: list[dict[str, Any]]) -> None:
        got.extend(step["step"] for step in steps)
        begun.set()
        go_on.wait(60)

    with fake_vllm() as vllm:
        session = kvhook.install(ring_slots=64)
        subscription = session.on_step(slow, every=0.001)
        engine = vllm.engine()
        run(engine, 1)
        session.trace()
        assert begun.wait(60)
        run(engine, 500, first=1)
        session.trace()
        go_on.set()
        subscription.close()
    assert got[0] == 0
    assert got[-1] == 500
    assert got == sorted(set(got))
    assert len(got) + subscription.dropped == 501
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
