"""What one step costs: kvhook's whole path and its parts, beside vLLM's own stats on the same objects.

    python benchmarks/hook_cost.py            the table
    python benchmarks/hook_cost.py --json     one JSON document

All figures of a table come from one run; rounds of the candidates are interleaved, so that whatever else the
machine does hits all of them alike. A figure is the median over the rounds of the mean time of a call; `+-` is half
the range of the middle half of the rounds: the run's own noise.

Without vLLM the objects are stand-ins with the same fields, and vLLM's own part is left out, which is said.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import wrapt

from kvhook import hooks
from kvhook.adapters import ADAPTERS
from kvhook.adapters.table import Adapter, vllm_version
from kvhook.recorder import Recorder

BATCHES = (1, 8, 64, 256, 1024)
ROUNDS = 40
CALLS = 50

Call = Callable[[], object]


class Stats:
    """The stats of one step, as vLLM makes them."""

    def __init__(self, batch: int, prefills: int = 0, finished: int = 0) -> None:
        from vllm.v1.metrics.stats import (
            FinishedRequestStats,
            IterationStats,
            PrefixCacheStats,
            SchedulerStats,
        )

        self.scheduler = SchedulerStats(
            num_running_reqs=batch,
            num_waiting_reqs=3,
            kv_cache_usage=0.5,
            prefix_cache_stats=PrefixCacheStats(requests=prefills, queries=prefills * 200, hits=prefills * 128),
        )
        self.iteration = IterationStats()
        self.iteration.num_generation_tokens = batch
        # in a step of decoding every request has the same latency: the batch moves together
        self.iteration.inter_token_latencies_iter = [float(f"{0.0123}") for _ in range(batch)]
        self.iteration.time_to_first_tokens_iter = [0.1 + 0.01 * random.random() for _ in range(prefills)]
        self.iteration.finished_requests = [_finished(FinishedRequestStats, i) for i in range(finished)]


def _finished(kind: Any, i: int) -> Any:
    from vllm.v1.engine import FinishReason

    return kind(
        finish_reason=FinishReason.LENGTH,
        request_id=str(i),
        e2e_latency=1.0,
        num_prompt_tokens=200,
        num_generation_tokens=100,
        max_tokens_param=100,
        queued_time=0.01,
        prefill_time=0.05,
        inference_time=0.9,
        decode_time=0.85,
        mean_time_per_output_token=0.0086,
        num_cached_tokens=128,
    )


def measure(candidates: dict[str, Call], rounds: int = ROUNDS, calls: int = CALLS) -> dict[str, dict[str, float]]:
    """Time the candidates in interleaved rounds; nanoseconds a call: median over the rounds, and its noise."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    gc.disable()
    try:
        for _ in range(rounds):
            random.shuffle(names)
            for name in names:
                call = candidates[name]
                call()
                start = time.perf_counter_ns()
                for _ in range(calls):
                    call()
                times[name].append((time.perf_counter_ns() - start) / calls)
    finally:
        gc.enable()
    out = {}
    for name, values in times.items():
        q1, median, q3 = statistics.quantiles(values, n=4)
        out[name] = {"ns": median, "noise_ns": (q3 - q1) / 2}
    return out


class Engine:
    """Something with a step, hooked exactly as LLMEngine is: it hands its stats to the recorder, and nothing else."""

    def __init__(self, stats: Stats) -> None:
        self.stats = stats
        self.record: Callable[..., None] = lambda **_: None

    def step(self) -> None:
        self.record(scheduler_stats=self.stats.scheduler, iteration_stats=self.stats.iteration, mm_cache_stats=None)


class HookedEngine(Engine):
    step = wrapt.FunctionWrapper(Engine.step, hooks.on_step)  # type: ignore[assignment]


def by_hand(stats: Stats) -> Callable[[], object]:
    """A hook as people write it: a loop over names, into a dictionary, into a list."""
    names = [n for n in vars(stats.scheduler) if not n.startswith("_")]
    inner = [n for n in vars(stats.iteration) if not n.startswith("_")]
    rows: list[dict[str, Any]] = []

    def hook() -> None:
        row = {name: getattr(stats.scheduler, name) for name in names}
        row |= {name: getattr(stats.iteration, name) for name in inner}
        latencies = stats.iteration.inter_token_latencies_iter
        row["itl_mean"] = sum(latencies) / len(latencies) if latencies else 0.0
        row["itl_max"] = max(latencies, default=0.0)
        row["t"] = time.time()
        rows.append(row)
        if len(rows) > 1000:
            rows.clear()

    return hook


@contextlib.contextmanager
def hooked(stats: Stats, adapter: Adapter) -> Iterator[tuple[HookedEngine, Recorder]]:
    """An engine that is recorded into a real ring in shared memory."""
    from kvhook.ring.place import find_directory

    with tempfile.TemporaryDirectory(dir=find_directory()) as folder:
        facts = {"num_kv_blocks": 1000, "finished_hook": True}
        recorder = Recorder(0, adapter, facts, Path(folder), 8192, hooks.clock)
        engine = HookedEngine(stats)
        engine.record = recorder.record
        hooks._steps[id(engine)] = recorder.publish
        try:
            yield engine, recorder
        finally:
            del hooks._steps[id(engine)]
            recorder.close()


def step_costs(adapter: Adapter, loggers: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per kind of step: kvhook and its parts, and vLLM's own loggers on the same objects."""
    rows = []
    steps = [(f"decode, batch {b}", b, 0, 0) for b in BATCHES] + [("8 prefills, 8 finished, batch 64", 64, 8, 8)]
    for name, batch, prefills, finished in steps:
        stats = Stats(batch, prefills, finished)
        bare = Engine(stats)
        with hooked(stats, adapter) as (engine, recorder):
            now = hooks.clock()
            given = {"scheduler_stats": stats.scheduler, "iteration_stats": stats.iteration, "mm_cache_stats": None}

            def hand_over_and_publish(
                recorder: Recorder = recorder, given: dict[str, Any] = given, now: int = now
            ) -> None:
                recorder.record(**given)
                recorder.publish(now, now)

            candidates: dict[str, Call] = {
                "bare step": bare.step,
                "hooked step": engine.step,
                "hand over + publish": hand_over_and_publish,
                "by hand: getattr to dict": by_hand(stats),
            }
            for logger_name, logger in loggers.items():
                candidates[logger_name] = lambda logger=logger, s=stats: logger.record(s.scheduler, s.iteration)
            times = measure(candidates)
        times["kvhook, whole path"] = {
            "ns": times["hooked step"]["ns"] - times["bare step"]["ns"],
            "noise_ns": times["hooked step"]["noise_ns"],
        }
        rows.append({"step": name, "times": times})
    return rows


def vllm_loggers() -> dict[str, Any]:
    """vLLM's own loggers, made for the configuration of a real engine over the tiny model."""
    from vllm import EngineArgs
    from vllm.v1.metrics.loggers import LoggingStatLogger, PrometheusStatLogger

    from kvhook.demo.model import make_tiny_model, tiny_model_dir

    model = str(make_tiny_model(tiny_model_dir()))
    config = EngineArgs(model=model, enforce_eager=True, max_model_len=1024).create_engine_config()
    loggers = {
        kind.__name__: kind(config, index) for kind, index in ((PrometheusStatLogger, [0]), (LoggingStatLogger, 0))
    }
    return {f"vLLM's {name}.record": logger for name, logger in loggers.items()}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": model or platform.processor(),
        "python": platform.python_version(),
        "wrapt": wrapt.__version__,
        "wrapt_c_extension": wrapt.FunctionWrapper.__module__ != "wrapt.wrappers",
        "vllm": vllm_version() or None,
        "system": platform.platform(terse=True),
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    args = parser.parse_args()
    adapter = ADAPTERS[0]
    try:
        import vllm.v1.engine.llm_engine  # noqa: F401
    except ImportError:
        print("vLLM is not installed here; its own part needs it: make test installs a CPU build", file=sys.stderr)
        return 1
    rows = step_costs(adapter, vllm_loggers())
    if args.json:
        print(json.dumps({"machine": machine(), "steps": rows}, indent=1))
        return 0
    print(", ".join(f"{k}: {v}" for k, v in machine().items()))
    for row in rows:
        print(f"\n{row['step']}")
        whole = row["times"]["kvhook, whole path"]["ns"]
        for name, t in row["times"].items():
            ratio = f"{t['ns'] / whole:8.1f} x kvhook" if name != "kvhook, whole path" and whole > 0 else ""
            print(f"  {name:36} {t['ns'] / 1e3:9.2f} us  +- {t['noise_ns'] / 1e3:5.2f}  {ratio}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
