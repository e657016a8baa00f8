"""What `hook_cost` compares: whole steps and parts of them, a hook made by hand, and vLLM's own ways."""

from __future__ import annotations

import contextlib
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import wrapt
from cost_objects import Objects, can_cache_envs, can_replace_envs, envs_cached, envs_replaced
from cost_recordings import RECORDINGS, Recording, bare_step
from cost_timing import Call, Candidate

from kvhook.hooks.quiet import do_nothing
from kvhook.hooks.registry import RecordedEngine, registry
from kvhook.hooks.wrappers import around_step, on_finished, on_step
from kvhook.ring.place import find_directory

PROMETHEUS, LOGGING = "vLLM's PrometheusStatLogger.record", "vLLM's LoggingStatLogger.record"
BUILD = "vLLM builds IterationStats"


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
