"""The ways to collect from an engine in this process: what each sees of one run, and what each costs."""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from collecting import load
from collecting.looks import Look, Run, against, interval_of, the_run
from collecting.polling import Poller
from collecting.truth import Row, watching

#: How often `get_metrics()` is polled.
RATES_HZ = (1, 10, 100)
#: Seconds between two looks at the ring, in another process.
EYE_INTERVAL = 0.001
#: Seconds between two calls of `session.steps()`, and of the collector, while they are timed.
ASK_INTERVAL = 2.0

_METRICS = ("vllm:kv_cache_usage_perc", "vllm:generation_tokens", "vllm:prefix_cache_queries", "vllm:prefix_cache_hits")

KVHOOK_RING = f"kvhook: ring, from another process every {1e3 * EYE_INTERVAL:g} ms"
KVHOOK_STEPS = "kvhook: session.steps()"
KVHOOK_LIGHT = 'kvhook, level="light"'
COLLECTOR_HOOK = 'VLLMMetricsCollector, source "hook"'
COLLECTOR_REGISTRY = 'VLLMMetricsCollector, source "prometheus_registry", every 1 s'
#: Seconds between two of vLLM's log lines: its default.
LINE_INTERVAL = 10
LOG_LINE = f"vLLM's log line, every {LINE_INTERVAL} s"
BASELINE, AGAIN = "stats off", "stats off, once more"


def polled(hz: float) -> str:
    """The name of a way."""
    return f"get_metrics() at {hz:g} Hz"


class LogLines(logging.FileHandler):
    """In place of vLLM's handler: writes all to a file, and keeps when each line with stats was written."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.looks: list[Look] = []

    def emit(self, record: logging.LogRecord) -> None:
        super().emit(record)
        look = look_of_line(time.monotonic_ns(), record.getMessage())
        if look is not None:
            self.looks.append(look)

    def take_over(self) -> None:
        """Be the only handler of vLLM's logger."""
        logging.getLogger("vllm").handlers[:] = [self]


def look_of_line(t: float, line: str) -> Look | None:
    """What a line of vLLM's log says; None if it is of something else."""
    usage = re.search(r"KV cache usage: ([\d.]+)%", line)
    if usage is None or "throughput" not in line:
        return None
    rate = re.search(r"Prefix cache hit rate: ([\d.]+)%", line)
    return Look(t, float(usage[1]) / 100, np.nan, rate=float(rate[1]) / 100 if rate else np.nan)


class Engine:
    """An ``LLM`` of the tiny model whose stats and recording can be switched, and its log lines."""

    def __init__(self, folder: Path) -> None:
        # the benchmarks ask for silence where nothing else is said
        os.environ["VLLM_LOGGING_LEVEL"] = "INFO"
        os.environ["VLLM_LOG_STATS_INTERVAL"] = str(LINE_INTERVAL)
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
        from switching import Switch
        from vllm import LLM

        from kvhook.demo.model import make_tiny_model, tiny_model_dir

        self.folder = folder
        self.lines = LogLines(folder / "vllm.log")
        self.lines.take_over()
        self.llm: Any = LLM(
            model=str(make_tiny_model(tiny_model_dir())),
            enforce_eager=True,
            dtype="bfloat16",
            disable_log_stats=False,
            use_tqdm_on_load=False,
            **load.ENGINE,
        )
        self.lines.take_over()  # vLLM may have set up its logging again
        self.engine = self.llm.llm_engine
        self.switch = Switch(self.llm)
        self._ids = itertools.count()

    def drive(self, work: Iterable[load.Batch]) -> tuple[float, list[float]]:
        """Do the work; seconds in all and of each step."""
        from vllm import SamplingParams

        engine, steps = self.engine, []
        begin = time.perf_counter()
        for batch in work:
            for prompt, tokens in zip(batch.prompts, batch.tokens, strict=True):
                params = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0, detokenize=False)
                engine.add_request(str(next(self._ids)), {"prompt_token_ids": prompt}, params)
            while engine.has_unfinished_requests():
                start = time.perf_counter()
                engine.step()
                steps.append(time.perf_counter() - start)
        return time.perf_counter() - begin, steps

    def look_at_metrics(self) -> Look:
        """One poll of ``get_metrics()``."""
        found = {metric.name: metric.value for metric in self.engine.get_metrics() if metric.name in _METRICS}
        return Look(time.monotonic_ns(), *(found[name] for name in _METRICS))

    def next_line_in(self, seconds: float) -> None:
        """When vLLM's next log line is due."""
        self.engine._last_log_time = time.time() + seconds - LINE_INTERVAL


# ---- what is seen --------------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """One run as it was and as each way saw it: way -> its looks, and way -> what `against` says of them."""

    run: Run
    looks: dict[str, Sequence[Look]]
    figures: dict[str, dict[str, Any]]
    #: the counters of vLLM at the end, less those at the start; to be compared with the truth
    counters: dict[str, int]


def see(engine: Engine, work: Iterable[load.Batch], line_after: float) -> Seen:
    """One run with all the ways at once, so that all of them see the same.

    Args:
        line_after: seconds after which the first log line is due.
    """
    from kvhook import VLLMMetricsCollector

    engine.switch.to("both")
    session = engine.switch.session
    hook = VLLMMetricsCollector(engine.llm, source="hook")
    registry = VLLMMetricsCollector(engine.llm, source="prometheus_registry")
    pollers = {polled(hz): Poller(engine.look_at_metrics, 1 / hz) for hz in RATES_HZ}
    asked = {
        KVHOOK_STEPS: Poller(_timed(lambda: session.steps()["num_generation_tokens"].sum()), ASK_INTERVAL),
        COLLECTOR_HOOK: Poller(_timed(lambda: _tokens_in(hook.collect_current_stats())), ASK_INTERVAL),
    }
    rows: list[Row] = []
    before = engine.look_at_metrics()
    with watching(rows.append), _eye(session.rings[-1], engine.folder) as eye:
        for one in (hook, registry):
            one.start_monitoring()
        for poller in (*pollers.values(), *asked.values()):
            poller.start()
        del engine.lines.looks[:]
        engine.next_line_in(line_after)
        engine.drive(work)
        for poller in asked.values():
            poller.cancel()
        for poller in pollers.values():
            poller.finish()
        for one in (registry, hook):
            one.stop_monitoring()
    after = engine.look_at_metrics()
    run = the_run(rows)
    steps, ring = session.steps(), eye()
    looks: dict[str, Sequence[Look]] = {
        KVHOOK_RING: _records(ring["t"], ring["usage"], ring["tokens"], ring["queries"], ring["hits"]),
        KVHOOK_STEPS: _records(
            steps["t_end_ns"],
            *(steps[n] for n in ("kv_cache_usage", "num_generation_tokens", "prefix_cache_queries")),
            steps["prefix_cache_hits"],
        ),
        COLLECTOR_HOOK: _of_history(hook.history()),
        COLLECTOR_REGISTRY: _since(before, _of_history(registry.history())),
        **{name: _since(before, poller.looks) for name, poller in pollers.items()},
        LOG_LINE: list(engine.lines.looks),
    }
    engine.switch.back()
    intervals = {polled(hz): 1 / hz for hz in RATES_HZ} | {COLLECTOR_REGISTRY: 1.0, LOG_LINE: float(LINE_INTERVAL)}
    recorders = (KVHOOK_RING, KVHOOK_STEPS, COLLECTOR_HOOK)
    figures = {
        name: against(run, found, records=name in recorders, interval=intervals.get(name))
        for name, found in looks.items()
    }
    for name, poller in asked.items():
        figures[name]["delay_ms"] = _when_asked(run, poller.looks)
    counters = {name: int(getattr(after, name) - getattr(before, name)) for name in ("tokens", "queries", "hits")}
    return Seen(run, looks, figures, counters)


def _timed(ask: Callable[[], int]) -> Callable[[], tuple[int, int, int]]:
    """When a question was asked, when it was answered, and how many tokens had been generated by the answer."""

    def look() -> tuple[int, int, int]:
        start = time.monotonic_ns()
        tokens = ask()
        return start, time.monotonic_ns(), int(tokens)

    return look


def _tokens_in(collected: dict[str, Any]) -> int:
    return int(collected["metrics_found"].get("num_generation_tokens", 0))


def _when_asked(run: Run, calls: Sequence[tuple[int, int, int]]) -> dict[str, Any]:
    """Nothing comes by itself, and nothing is waited for: the delay is what the answer takes. Also how many steps that
    had ended before the question were not in the answer, at most."""
    took, behind = [], [0]
    for start, end, tokens in calls:
        if run.t[0] <= start <= run.t[-1]:
            took.append((end - start) / 1e6)
            behind.append(int(np.sum((run.t <= start) & (run.tokens > tokens))))
    p50, p99, most = (float(q) for q in np.quantile(took, (0.5, 0.99, 1), method="higher"))
    return {"p50": p50, "p99": p99, "max": most, "never_shown": 0.0, "asked": len(took), "steps_behind": max(behind)}


def _records(t: Any, usage: Any, tokens: Any, queries: Any, hits: Any) -> list[Look]:
    """A look per record; its counts are those of its step."""
    totals = (np.cumsum(column) for column in (tokens, queries, hits))
    return [Look(*values) for values in zip(t.tolist(), usage.tolist(), *(c.tolist() for c in totals), strict=True)]


def _of_history(rows: Any) -> list[Look]:
    """The collector's history."""
    names = ("kv_cache_usage", "num_generation_tokens", "prefix_cache_queries", "prefix_cache_hits")
    return [Look(1e9 * row["t"], *(float(row[name]) for name in names)) for row in rows]


def _since(first: Look, looks: Iterable[Look]) -> list[Look]:
    """Totals since the first look."""
    return [
        look._replace(**{n: getattr(look, n) - getattr(first, n) for n in ("tokens", "queries", "hits")})
        for look in looks
    ]


@contextlib.contextmanager
def _eye(ring: Path, folder: Path) -> Iterator[Callable[[], Any]]:
    """Another process that looks at the ring meanwhile; gives what gives its looks afterwards."""
    out = folder / "eye.npz"
    command = [sys.executable, str(Path(__file__).with_name("ring_eye.py")), str(ring), str(EYE_INTERVAL), str(out)]
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | paths)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if process.stdout.readline() != b"ready\n":
            raise RuntimeError(f"the reader of the ring {ring} did not start; it says why above")
        yield lambda: np.load(out)
    finally:
        process.stdin.close()
        process.wait(60)
        process.stdout.close()


# ---- what it costs -------------------------------------------------------------------------------------------------


def costs(engine: Engine, rounds: int, count: int, said: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Way -> its throughput and step time as ratios to the engine with its stats off, in interleaved rounds.

    Each round does the same work with each way, in a random order, from an empty cache. What a way needs to begin and
    to end (installing kvhook, starting a thread) is not in the times.
    """
    arms: dict[str, Callable[[], Callable[[], object]]] = {
        BASELINE: lambda: _switched(engine, "off"),
        AGAIN: lambda: _switched(engine, "off"),
        KVHOOK_STEPS: lambda: _switched(engine, "full"),
        KVHOOK_LIGHT: lambda: _switched(engine, "light"),
        COLLECTOR_HOOK: lambda: _collecting(engine, "full", "hook"),
        COLLECTOR_REGISTRY: lambda: _collecting(engine, "stats", "prometheus_registry"),
        **{polled(hz): lambda hz=hz: _polling(engine, hz) for hz in RATES_HZ},  # type: ignore[misc]
        LOG_LINE: lambda: _switched(engine, "stats"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    medians: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        work = list(load.batches(count, seed=1000 + number))
        for name in random.sample(list(arms), len(arms)):
            undo = arms[name]()
            engine.engine.reset_prefix_cache()
            engine.next_line_in(random.random() * LINE_INTERVAL)
            gc.collect()
            wall, steps = engine.drive(work)
            undo()
            if number:  # the first round warms up
                seconds[name].append(wall)
                medians[name].append(float(np.median(steps)))
        said(f"costs, in this process: round {number} of {rounds}")
    return {
        name: {
            "against": BASELINE,
            "rounds": rounds,
            "seconds_a_round": float(np.median(seconds[name])),
            "throughput": interval_of(np.array(seconds[BASELINE]) / np.array(seconds[name])),
            "step_p50": interval_of(np.array(medians[name]) / np.array(medians[BASELINE])),
        }
        for name in arms
        if name != BASELINE
    }


def _switched(engine: Engine, arm: str) -> Callable[[], object]:
    engine.switch.to(arm)
    return engine.switch.back


def _polling(engine: Engine, hz: float) -> Callable[[], object]:
    back = _switched(engine, "stats")
    poller = Poller(engine.look_at_metrics, 1 / hz)
    poller.start()
    return lambda: (poller.cancel(), back())


def _collecting(engine: Engine, arm: str, source: str) -> Callable[[], object]:
    from kvhook import VLLMMetricsCollector

    back = _switched(engine, arm)
    collector = VLLMMetricsCollector(engine.llm, source=source)
    collector.start_monitoring()
    # its thread samples each second from now on: begin the work at any moment of that second
    time.sleep(random.random() * collector.collection_interval)
    return lambda: (collector.close(), back())
