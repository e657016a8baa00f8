"""The ways to record that `hook_cost` measures: what a step does to hand its stats over, with kvhook and without it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import cost_report
import wrapt
from cost_objects import ENGINE, Objects
from cost_timing import Call

from kvhook import _step
from kvhook.adapters.fit import adapter_for, choose
from kvhook.hooks.engines import clock
from kvhook.hooks.registry import registry
from kvhook.hooks.tap import Tap
from kvhook.hooks.taps import TAPS
from kvhook.hooks.wrappers import on_record
from kvhook.recording.recorder import Recorder


class Recording(NamedTuple):
    """One way to record: what a step of the engine does to hand its stats over, and the functions of the path."""

    #: the engine's ``step(self)`` with kvhook and without it; `members` are what they find in self
    step: Callable[[Any], Any]
    bare_step: Callable[[Any], Any]
    members: dict[str, Any]
    publish: Callable[[int, int], None]
    close: Call
    #: parts of the path that can be called by themselves; see `part_candidates`
    parts: dict[str, Call]
    #: whether the step path is Python's although the extension is there
    in_python: bool = False


def bare_step(self: Any) -> Any:
    """A step with stats off: there is nothing to hand over."""
    return self.outputs


def full(objects: Objects, folder: Path) -> Recording:
    """As by default: vLLM hands both stats objects to kvhook alone."""
    facts = {"num_kv_blocks": 1000, "finished_hook": True}
    recorder = Recorder(0, adapter_for(f"{ENGINE}:LLMEngine"), facts, folder, 8192, clock)
    record, publish = recorder.functions.record, recorder.functions.publish
    scheduler, iteration = objects.scheduler, objects.iteration

    def step(self: Any) -> Any:
        self.record(scheduler_stats=self.scheduler_stats, iteration_stats=self.iteration_stats, mm_cache_stats=None)
        return self.outputs

    def hand_over() -> None:
        record(scheduler_stats=scheduler, iteration_stats=iteration, mm_cache_stats=None)

    def hand_over_and_publish() -> None:
        record(scheduler_stats=scheduler, iteration_stats=iteration, mm_cache_stats=None)
        publish(1, 2)

    members = {"record": record, "scheduler_stats": scheduler, "iteration_stats": iteration}
    parts = {"hand over": hand_over, "hand over and publish": hand_over_and_publish, **pack_and_store(recorder)}
    return Recording(step, bare_step, members, publish, recorder.close, parts)


def beside_vllm(objects: Objects, folder: Path) -> Recording:
    """The user's stats are on: kvhook looks at them as they pass to vLLM's own manager (here one that does nothing)."""
    recording = full(objects, folder)

    class Manager:
        def record(self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None) -> None: ...

    class Hooked(Manager):
        record = wrapt.FunctionWrapper(Manager.record, on_record)

    manager = Hooked()
    registry.records[id(manager)] = recording.members["record"]

    def step(self: Any) -> Any:
        self.manager.record(
            scheduler_stats=self.scheduler_stats, iteration_stats=self.iteration_stats, mm_cache_stats=None
        )
        return self.outputs

    def bare(self: Any) -> Any:
        self.bare_manager.record(
            scheduler_stats=self.scheduler_stats, iteration_stats=self.iteration_stats, mm_cache_stats=None
        )
        return self.outputs

    def close() -> None:
        del registry.records[id(manager)]
        recording.close()

    members = recording.members | {"manager": manager, "bare_manager": Manager()}
    return recording._replace(step=step, bare_step=bare, members=members, close=close, parts={})


def light(objects: Objects, folder: Path) -> Recording:
    """Level light: the engine core's client is tapped, outputs are counted; the front end makes no stats."""
    adapter, _, _ = choose(f"{ENGINE}:LLMEngine", "light")
    facts = {"num_kv_blocks": 1000, "stats_from_core": True, **{name: ask() for name, ask in adapter.asks.items()}}
    recorder = Recorder(0, adapter, facts, folder, 8192, clock)
    sent, states = objects.outputs_and_states()
    outputs = SimpleNamespace(outputs=sent, scheduler_stats=objects.scheduler)
    client, bare_client = (SimpleNamespace(get_output=lambda: outputs) for _ in range(2))
    processor = SimpleNamespace(request_states=states, process_outputs=None)

    def failed(error: Exception) -> None:
        raise error

    tapped: Any = SimpleNamespace(engine_core=client, output_processor=processor)
    TAPS[adapter.tap](Tap(tapped, adapter, recorder.functions, {}, failed))

    def step(self: Any) -> Any:
        return self.client.get_output().outputs

    def bare(self: Any) -> Any:
        return self.bare_client.get_output().outputs

    members = {"client": client, "bare_client": bare_client}
    return Recording(step, bare, members, recorder.functions.publish, recorder.close, {})


def in_python(open_recording: Callable[[Objects, Path], Recording]) -> Callable[[Objects, Path], Recording]:
    """The same on Python's step path."""

    def opened(objects: Objects, folder: Path) -> Recording:
        native, _step.native = _step.native, None
        try:
            return open_recording(objects, folder)._replace(in_python=True, parts={})
        finally:
            _step.native = native

    return opened


#: Every way to record that is measured; the first is the one that others are compared with.
RECORDINGS: dict[str, Callable[[Objects, Path], Recording]] = {
    "kvhook full": full,
    "kvhook full, vLLM's stats on": beside_vllm,
    "kvhook light": light,
}
if _step.native is not None:
    for each in ("kvhook full", "kvhook light"):
        RECORDINGS[cost_report.IN_PYTHON.format(each)] = in_python(RECORDINGS[each])


def pack_and_store(recorder: Recorder) -> dict[str, Call]:
    """Packing one record of numbers, and storing it in the ring, each by itself."""
    columns = recorder.compiled.layout.columns["step"]
    pack, store = recorder.compiled.layout.struct_of("step").pack, recorder.ring.publish
    cells = [0, 1, 0, *(0.5 if c.type == "f8" else 12345 for c in columns)]
    record, n = pack(*cells), 0

    def store_one() -> None:
        nonlocal n
        n = store(n, record)

    return {"pack": lambda: pack(*cells), "store": store_one}
