"""What is done to an engine between its steps: sleep, new weights, an emptied prefix cache, LoRA adapters."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

import kvhook
from kvhook.adapters.engine_events import describe
from kvhook.recording.engine_events import EventsBook
from kvhook.records.engine_events import CODES, DONE, KINDS, EngineEvent, as_cells, from_cells, from_meta, kind_of
from kvhook.records.events import Events
from tests.conftest import ROOT
from tests.standin import ENGINE, fake_vllm, step_stats

pytestmark = pytest.mark.usefixtures("fresh")


def with_methods(modules: dict[str, Any]) -> None:
    """Give the stand-in the methods of a real engine, which tell in `calls` that they were called."""
    engine = modules[ENGINE].LLMEngine
    engine.calls = []

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        self.calls.append(("sleep", level))
        self.reset_mm_cache()

    def wake_up(self, tags: list[str] | None = None) -> bool:
        self.calls.append(("wake_up", tags))
        return False  # other tags still sleep

    def reset_mm_cache(self) -> None:
        self.calls.append("reset_mm_cache")

    def reset_prefix_cache(self) -> bool:
        return self.free

    def collective_rpc(self, method: Any, timeout: Any = None, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return [args]

    def update_weights(self, request: Any) -> Any:
        return self.collective_rpc("update_weights", args=(request,))

    def add_lora(self, lora_request: Any) -> bool:
        raise ValueError("a secret path")

    engine.free = True
    for method in (*(sleep, wake_up, reset_mm_cache, reset_prefix_cache, collective_rpc, update_weights, add_lora),):
        setattr(engine, method.__name__, method)


def told(session: Any) -> list[tuple[str, str, str]]:
    return [(e.kind, e.detail, e.outcome) for e in session.engine_events]


def test_calls_are_noted_in_their_order_with_what_they_were_told_and_how_they_ended(tmp_path: Path):
    with fake_vllm(change=with_methods) as vllm, kvhook.install(trace=tmp_path / "run.kvh") as session:
        engine = vllm.engine()
        engine.plan += [step_stats()] * 4
        engine.step()
        before = time.monotonic_ns()
        engine.sleep(level=2)
        engine.collective_rpc("update_named_param", args=("w", 1))
        engine.collective_rpc("determine_available_memory")
        engine.wake_up(tags=["weights"])
        engine.step()
        assert engine.reset_prefix_cache()
        engine.free = False
        assert engine.reset_prefix_cache() is False
        with pytest.raises(ValueError, match="secret"):
            engine.add_lora(types.SimpleNamespace(lora_name="french", lora_path="/secret"))
        engine.update_weights("new ones")
        after = time.monotonic_ns()
        expected = [
            ("sleep", "level 2", DONE),
            ("mm_cache_reset", "", DONE),  # vLLM's sleep does that
            ("weights_updated", "update_named_param", DONE),
            ("wake_up", "tags weights", DONE),
            ("prefix_cache_reset", "", DONE),
            ("prefix_cache_reset", "", "refused"),
            ("lora_added", "french", "ValueError"),
            ("weights_updated", "", DONE),  # once: its call of the workers is its own
        ]
        assert told(session) == expected
        for event in session.engine_events:
            assert before <= event.began_ns <= event.ended_ns <= after
            assert event.engines == (0,)
        assert engine.calls == [("sleep", 2), "reset_mm_cache", ("wake_up", ["weights"])]
        summary = str(session.summary())
    trace = kvhook.open(tmp_path / "run.kvh")
    assert told(trace) == expected
    assert abs(trace.engine_events[0].began_unix_ns - time.time_ns()) < 60e9
    totals = {t.kind: (t.calls, t.refused, t.failed) for t in trace.summary().engine_events}
    assert totals["prefix_cache_reset"] == (2, 1, 0)
    assert totals["lora_added"] == (1, 0, 1)
    assert "put to sleep once" in summary
    assert "prefix cache reset 2 times (1 refused)" in summary
    assert "secret" not in (tmp_path / "run.kvh").read_bytes().decode("latin-1")


def test_uninstall_puts_the_methods_back_and_nothing_is_noted_of_an_engine_that_is_not_recorded():
    with fake_vllm(change=with_methods) as vllm:
        cls: Any = sys.modules[ENGINE].LLMEngine
        originals = {name: vars(cls)[name] for name in ("sleep", "collective_rpc", "reset_prefix_cache")}
        before = vllm.engine()
        with kvhook.install() as session:
            assert vars(cls)["sleep"] is not originals["sleep"]
            before.sleep()
            assert told(session) == []
        assert {name: vars(cls)[name] for name in originals} == originals


def test_a_summary_says_nothing_of_them_if_there_were_none():
    with fake_vllm(change=with_methods) as vllm, kvhook.install() as session:
        engine = vllm.engine()
        engine.plan.append(step_stats())
        engine.step()
        summary = session.summary()
    assert summary.engine_events == []
    assert "engine events" not in str(summary)


def test_many_calls_in_a_row_are_one_event_until_a_step_comes():
    with fake_vllm(change=with_methods) as vllm, kvhook.install() as session:
        engine = vllm.engine()
        engine.plan += [step_stats()] * 2
        engine.step()
        for n in range(300):
            engine.collective_rpc("update_named_param", args=(n,))
        engine.step()
        engine.collective_rpc("update_named_param", args=(0,))
        events = session.engine_events
    assert [(e.kind, e.calls) for e in events] == [("weights_updated", 300), ("weights_updated", 1)]
    assert events[0].text == "weights updated (update_named_param) in 300 calls"


def test_what_a_killed_process_was_in_the_middle_of_is_in_its_trace(tmp_path: Path):
    code = f"""
import os, signal, kvhook
from tests.standin import fake_vllm, step_stats
from tests.test_engine_events import with_methods
with fake_vllm(change=with_methods) as vllm:
    kvhook.install(trace={str(tmp_path / "run.kvh")!r})
    engine = vllm.engine()
    engine.plan += [step_stats()] * 2
    engine.step()
    engine.reset_prefix_cache()
    engine.calls = type("Deadly", (list,), {{"append": lambda *_: os.kill(os.getpid(), signal.SIGKILL)}})()
    engine.sleep()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "KVHOOK_DIR": str(tmp_path / "rings")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    trace = kvhook.open(tmp_path / "run.kvh")
    assert told(trace) == [("prefix_cache_reset", "", DONE), ("sleep", "level 1", "")]
    assert str(trace.engine_events[1]) == "put to sleep (level 1), has not ended"
    assert {t.kind: t.failed for t in trace.summary().engine_events} == {"prefix_cache_reset": 0, "sleep": 1}


def test_they_go_through_every_export_and_through_traces_side_by_side(tmp_path: Path):
    paths = [tmp_path / "a.kvh", tmp_path / "b.kvh"]
    for path in paths:
        with fake_vllm(change=with_methods) as vllm, kvhook.install(trace=path):
            engine = vllm.engine()
            engine.plan += [step_stats()] * 2
            engine.step()
            engine.sleep()
            engine.step()
        kvhook.uninstall()
    whole = kvhook.open(*paths)
    assert [(e.number, e.kind, e.engines) for e in whole.engine_events] == [
        (0, "sleep", (0,)),
        (1, "mm_cache_reset", (0,)),
        (2, "sleep", (1,)),
        (3, "mm_cache_reset", (1,)),
    ]
    assert [t.calls for t in whole.summary(engine=1).engine_events] == [1, 1]
    one = kvhook.open(paths[0])
    for name in ("out.jsonl", "out.kvh"):
        one.dump(tmp_path / name)
        again = kvhook.open(tmp_path / name)
        assert told(again) == told(one), name
        assert [e.began_ns for e in again.engine_events] == [e.began_ns for e in one.engine_events]


def test_a_part_counts_those_that_began_in_it():
    with fake_vllm(change=with_methods) as vllm, kvhook.install() as session:
        engine = vllm.engine()
        engine.plan += [step_stats()] * 6
        with session.scope("first"):
            engine.step()
            engine.reset_prefix_cache()
            engine.step()
        engine.sleep()
        with session.scope("second"):
            engine.step()
            engine.step()
        counts = {name: [t.kind for t in session.summary(scope=name).engine_events] for name in ("first", "second")}
    assert counts == {"first": ["prefix_cache_reset"], "second": []}


def test_coroutines_are_noted_when_they_have_been_awaited_also_if_they_are_cancelled():
    from kvhook.hooks.engine_events import _around

    noted: list[Any] = []

    class Owner:
        def begin_engine_event(self, engine: Any, what: Any) -> Any:
            noted.append(what)
            return noted.append

        def fault(self, *args: Any) -> None:
            raise AssertionError(args)

    from kvhook.hooks.registry import registry

    async def wake_up(tags: Any = None) -> str:
        await asyncio.sleep(0)
        return "awake"

    async def reset_prefix_cache() -> None:
        await asyncio.Event().wait()

    async def drive(engine: Any) -> None:
        assert await _around("wake_up")(wake_up, engine, (["kv_cache"],), {}) == "awake"
        task = asyncio.ensure_future(_around("reset_prefix_cache")(reset_prefix_cache, engine, (), {}))
        await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    engine: Any = object()
    before = registry.owner
    registry.owner, registry.engines[id(engine)] = Owner(), None  # type: ignore[assignment]
    try:
        asyncio.run(drive(engine))
    finally:
        registry.owner = before
        del registry.engines[id(engine)]
    assert [getattr(each, "kind", each) for each in noted] == ["wake_up", DONE, "prefix_cache_reset", "CancelledError"]


@pytest.mark.parametrize(
    ("called", "kind"),
    [
        ("update_weights", "weights_updated"),
        ("reload_weights", "weights_updated"),
        ("update_weight_cuda_ipc", "weights_updated"),
        ("load_named_params", "weights_updated"),
        ("sleep", "sleep"),
        ("check_weights_changed", None),
        ("init_weight_transfer_engine", None),
        ("save_sharded_state", None),
        (functools.partial(print), None),
        (17, None),
    ],
)
def test_which_calls_of_the_workers_bring_new_weights(called: Any, kind: str | None):
    def collective_rpc(method: Any) -> None: ...

    found = describe(collective_rpc, "collective_rpc", (called,), {})
    assert (found.kind if found else None) == kind


def test_the_ring_says_what_was_last_done_to_the_engine():
    from kvhook.ring.reader import RingReader

    with fake_vllm(change=with_methods) as vllm, kvhook.install() as session:
        engine = vllm.engine()
        engine.plan.append(step_stats())
        engine.step()
        reader = RingReader(session.rings[0])

        def says() -> list[str]:
            return [kind_of(word[0]) if word else "" for word in (reader.last_event, reader.rest)]

        assert says() == ["", ""]
        engine.wake_up()
        assert says() == ["wake_up", ""]
        engine.sleep()
        engine.update_weights("new ones")
        assert says() == ["weights_updated", "sleep"]
        engine.wake_up()
        assert says() == ["wake_up", ""]
        assert all(0 <= time.monotonic_ns() - word[1] < 60e9 for word in [reader.last_event] if word)
        reader.close()
    assert sorted(CODES.values()) == list(range(1, len(KINDS) + 1))
    assert [kind_of(0), kind_of(len(KINDS) + 1)] == ["", ""]


def test_what_is_no_event_in_a_file_is_left_out():
    good = as_cells(EngineEvent(3, "sleep", (0,), 5, 6, "level 1", DONE))
    events = Events()
    events.take([good, good[:-1], ["engine_event", "x", *good[2:]], ["engine_event", 4, 7, *good[3:]], [*good, 1]])
    assert list(events.engine_events) == [3]
    assert from_cells(good[1:]) == events.engine_events[3]
    assert events.as_list() == [good]
    assert from_meta([events.engine_events[3]._asdict(), {"number": 1}, 7]) == [events.engine_events[3]]
    assert from_meta(json.loads("[null]")) == []


def test_the_book_stays_small_and_is_written_as_a_whole_into_a_new_file(monkeypatch: pytest.MonkeyPatch):
    from kvhook.recording import engine_events

    monkeypatch.setattr(engine_events, "MOST_KEPT", 5)
    written: list[int] = []
    book = EventsBook(time.monotonic_ns, lambda: written.append(1))
    for n in range(9):
        book.begin("sleep", [0], recorded=n)(DONE)
    assert len(written) == 18
    assert [cells[1] for cells in book.everything()] == [4, 5, 6, 7, 8]
    assert [cells[1] for cells in book.take()] == list(range(9))
    assert not book.due
