"""What one step costs: kvhook's whole path and its parts, beside vLLM's own stats on the same objects.

    python benchmarks/hook_cost.py                the tables: hot, in a busy interpreter, with cold caches
    python benchmarks/hook_cost.py --quick        fewer steps and rounds, one process
    python benchmarks/hook_cost.py --thorough     every kind of step in every state; some minutes
    python benchmarks/hook_cost.py --json         one JSON document
    python benchmarks/hook_cost.py --stand-ins    without vLLM: kvhook's own part on stand-ins with the same fields

Figures are medians; `+-` is half the range of the middle half of the rounds of all worker processes. Figures that are
compared are ratios of the same round (hot) or of the same process (all other states). One candidate is measured twice,
under two names, and what those two differ by is the run's own noise. Hot figures come with the loop that calls (row
"empty call"), others with their two clock reads as well: nothing is subtracted but where a row is of a whole path or a
part of it, which is what a step takes with kvhook less what it takes without. `cost_timing` says what the states are.

pyperf is not used, since it runs one benchmark after the other and cannot interleave them; calibrated blocks, warm-up,
several processes, medians with their spread and the system's load are as there.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import cost_report
import cost_timing as timing
import wrapt
from cost_objects import (
    ENGINE,
    KINDS_OF_STEP,
    Objects,
    StepKind,
    can_cache_envs,
    can_replace_envs,
    envs_cached,
    envs_replaced,
    vllm_or_stand_ins,
)
from cost_timing import Call, Candidate

from kvhook import _step
from kvhook.adapters.fit import adapter_for, choose
from kvhook.adapters.table import vllm_version
from kvhook.hooks.engines import clock
from kvhook.hooks.quiet import do_nothing
from kvhook.hooks.registry import RecordedEngine, registry
from kvhook.hooks.tap import Tap
from kvhook.hooks.taps import TAPS
from kvhook.hooks.wrappers import around_step, on_finished, on_record, on_step
from kvhook.recording.recorder import Recorder
from kvhook.ring.place import find_directory

PROMETHEUS, LOGGING = "vLLM's PrometheusStatLogger.record", "vLLM's LoggingStatLogger.record"
BUILD = "vLLM builds IterationStats"
ALL_STEPS = tuple(k.name for k in KINDS_OF_STEP)
SOME_STEPS = ("decode, batch 1", "decode, batch 256", "8 prefills, 8 finished, batch 64")


class Settings(NamedTuple):
    """How much is measured."""

    workers: int
    #: in the hot state, and of which steps
    rounds: int
    steps: tuple[str, ...]
    #: single calls in the other states, and of which steps
    calls: dict[str, int]
    single_steps: tuple[str, ...]
    stand_ins: bool = False


QUICK = Settings(
    1, 10, SOME_STEPS[:2], {"thread": 400, "busy": 150, "own caches": 80, "cold": 4, "forward": 80}, SOME_STEPS[:2]
)
USUAL = Settings(
    3, 15, ALL_STEPS, {"thread": 800, "busy": 400, "own caches": 200, "cold": 7, "forward": 150}, SOME_STEPS
)
THOROUGH = Settings(
    5, 30, ALL_STEPS, {"thread": 2000, "busy": 1000, "own caches": 500, "cold": 15, "forward": 400}, ALL_STEPS
)


# ---- ways to record ------------------------------------------------------------------------------------------------


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


def make_engine(
    step: Callable[[Any], Any], members: dict[str, Any], publish: Any, *, wrapped: bool, in_python: bool = False
) -> Any:
    """Something with a step, hooked exactly as LLMEngine is."""
    hooked = wrapt.FunctionWrapper(step, on_step) if in_python else around_step(step)
    wrapper = hooked if wrapped else step
    engine = type("Engine", (), {"step": wrapper})()
    vars(engine).update(members | {"outputs": []})
    if wrapped:
        registry.steps[id(engine)] = publish
    return engine


def by_hand(objects: Objects) -> Call:
    """A hook as people write it: a loop over names, into a dictionary, into a list."""
    scheduler, iteration, latencies_name = objects.scheduler, objects.iteration, objects.latencies_name
    names = [n for n in vars(scheduler) if not n.startswith("_")]
    inner = [n for n in vars(iteration) if not n.startswith("_")]
    rows: list[dict[str, Any]] = []

    def hook() -> None:
        row = {name: getattr(scheduler, name) for name in names}
        row |= {name: getattr(iteration, name) for name in inner}
        latencies = getattr(iteration, latencies_name)
        row["itl_mean"] = sum(latencies) / len(latencies) if latencies else 0.0
        row["itl_max"] = max(latencies, default=0.0)
        row["t"] = time.time()
        rows.append(row)
        if len(rows) > 1000:
            rows.clear()

    return hook


# ---- candidates ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def recorded(objects: Objects) -> Iterator[dict[str, tuple[Recording, Any]]]:
    """Each way to record, with an engine that is recorded so, into a real ring in shared memory."""
    made: dict[str, tuple[Recording, Any]] = {}
    with tempfile.TemporaryDirectory(dir=find_directory()) as folder:
        try:
            for name, open_recording in RECORDINGS.items():
                recording = open_recording(objects, Path(folder))
                engine = make_engine(
                    recording.step, recording.members, recording.publish, wrapped=True, in_python=recording.in_python
                )
                made[name] = recording, engine
            # the hook on finished requests asks whether any engine is recorded
            registry.engines[0] = RecordedEngine(do_nothing)
            yield made
        finally:
            registry.engines.clear()
            for recording, engine in made.values():
                del registry.steps[id(engine)]
                recording.close()


def whole_candidates(
    objects: Objects, made: dict[str, tuple[Recording, Any]], loggers: dict[str, Any]
) -> dict[str, Candidate]:
    """What is compared, in every state."""
    calls: dict[str, Call] = {
        "empty call": lambda: None,
        **{f"{name}: step": engine.step for name, (_, engine) in made.items()},
        **{
            f"{name}: bare step": make_engine(recording.bare_step, recording.members, None, wrapped=False).step
            for name, (recording, _) in made.items()
        },
        "by hand: getattr to dict": by_hand(objects),
    }
    first = next(iter(made))
    calls[f"{first}: step, again"] = made[first][1].step
    for name, logger in loggers.items():
        calls[name] = lambda record=logger.record: record(objects.scheduler, objects.iteration)
    if objects.real:
        calls[BUILD] = objects.build
    return {name: Candidate(call) for name, call in calls.items()}


def part_candidates(objects: Objects, made: dict[str, tuple[Recording, Any]]) -> dict[str, Candidate]:
    """The parts of the path, each callable by itself."""
    only_wrapper = make_engine(bare_step, {}, lambda start, end: None, wrapped=True)
    calls: dict[str, Call] = {"only the wrapper: step": only_wrapper.step}
    for name, (recording, _) in made.items():
        calls |= {f"{name}: {part}": call for part, call in recording.parts.items()}
    if objects.kind.finished:
        plain = objects.iteration_stats_class
        original = plain.update_from_finished_request
        hooked = type("Hooked", (plain,), {original.__name__: wrapt.FunctionWrapper(original, on_finished)})
        for name, into in (("bare", plain()), ("hooked", hooked())):
            calls[f"finished requests, {name}"] = functools.partial(objects.finish_into, into)
    return {name: Candidate(call) for name, call in calls.items()}


def vllm_candidates(objects: Objects) -> dict[str, Candidate]:
    """vLLM's own ways to build IterationStats, and one look at its metrics."""
    from vllm.v1.metrics.reader import get_metrics_snapshot

    found = {f"{BUILD}: not at all": Candidate(objects.skip), "vLLM's get_metrics()": Candidate(get_metrics_snapshot)}
    if can_cache_envs():
        found[f"{BUILD}: look-ups cached"] = Candidate(objects.build, envs_cached)
    if can_replace_envs():
        found[f"{BUILD}: snapshot for look-ups"] = Candidate(objects.build, envs_replaced)
    return found


def vllm_loggers() -> dict[str, Any]:
    """vLLM's own loggers, made for the configuration of a real engine over the tiny model."""
    from vllm import EngineArgs
    from vllm.v1.metrics.loggers import LoggingStatLogger, PrometheusStatLogger

    from kvhook.demo.model import make_tiny_model, tiny_model_dir

    model = str(make_tiny_model(tiny_model_dir()))
    config = EngineArgs(model=model, enforce_eager=True, max_model_len=1024).create_engine_config()
    return {PROMETHEUS: PrometheusStatLogger(config, [0]), LOGGING: LoggingStatLogger(config, 0)}


def measure(settings: Settings) -> dict[str, dict[str, timing.Times]]:
    """All states in this process: state -> step -> candidate -> nanoseconds."""
    found: dict[str, dict[str, timing.Times]] = {state: {} for state in ("hot", *timing.SINGLE)}
    with vllm_or_stand_ins(settings.stand_ins):
        loggers = {} if settings.stand_ins else vllm_loggers()
        if not settings.stand_ins and can_cache_envs():
            sys.modules["vllm.envs"].disable_envs_cache()  # as in a front end, whatever was called here before
        for kind in KINDS_OF_STEP:
            if kind.name in settings.steps:
                measure_step(kind, settings, loggers, found)
    return found


def measure_step(
    kind: StepKind, settings: Settings, loggers: dict[str, Any], found: dict[str, dict[str, timing.Times]]
) -> None:
    """One kind of step, in every state."""
    objects = Objects(kind, stand_ins=settings.stand_ins)
    with recorded(objects) as made:
        whole = whole_candidates(objects, made, loggers)
        more = part_candidates(objects, made) | ({} if settings.stand_ins else vllm_candidates(objects))
        found["hot"][kind.name] = timing.hot(whole | more, settings.rounds)
        if kind.name in settings.single_steps:
            for state, time_calls in timing.SINGLE.items():
                found[state][kind.name] = time_calls(whole, settings.calls[state])


# ---- machine, workers, command line --------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": model or platform.processor(),
        "python": platform.python_version(),
        "step_path": "the extension" if _step.native is not None else f"Python ({_step.why_not})",
        "wrapt": wrapt.__version__,
        "wrapt_c_extension": wrapt.FunctionWrapper.__module__ != "wrapt.wrappers",
        "vllm": vllm_version() or None,
        "system": platform.platform(terse=True),
    }


def worker(settings: Settings, answer: Path) -> None:
    """In a process of its own: measure, and leave the times and what they were measured on."""
    found = measure(settings)
    answer.write_text(json.dumps({"machine": machine(), "times": found}))


def run_workers(settings: Settings) -> list[dict[str, Any]]:
    """One process after the other, each with its own memory layout; what each has found."""
    answers = []
    environment = {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"} | os.environ
    for number in range(settings.workers):
        with tempfile.TemporaryDirectory() as folder:
            answer = Path(folder) / "answer.json"
            command = [sys.executable, __file__, "--worker", str(answer), json.dumps(settings)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"worker {number} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
            answers.append(json.loads(answer.read_text()))
        print(f"\rprocess {number + 1} of {settings.workers} is done", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return answers


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--quick", action="store_true", help="fewer steps and rounds, in one process")
    parser.add_argument("--thorough", action="store_true", help="every kind of step in every state")
    parser.add_argument("--stand-ins", action="store_true", help="leave vLLM out even where it is installed")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(Settings(*json.loads(args.worker[1])), Path(args.worker[0]))
        return 0
    stand_ins = args.stand_ins or importlib.util.find_spec("vllm") is None
    settings = (QUICK if args.quick else THOROUGH if args.thorough else USUAL)._replace(stand_ins=stand_ins)
    load = os.getloadavg()[0]
    answers = run_workers(settings)
    names = cost_report.Names(next(iter(RECORDINGS)), tuple(RECORDINGS), PROMETHEUS, BUILD)
    report = cost_report.Report(names, [answer["times"] for answer in answers])
    about = answers[0]["machine"] | {
        "processors": os.cpu_count(),
        "load_before": round(load, 2),
        "load_after": round(os.getloadavg()[0], 2),
        "caches": timing.cache_bytes(),
        "evicted_with": timing.eviction_bytes(),
    }
    document = {"machine": about, "settings": settings._asdict(), "stand_ins": stand_ins} | report.document()
    print(json.dumps(document, indent=1) if args.json else cost_report.text(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
