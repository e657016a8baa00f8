"""What the engine tests run, and a view of it that kvhook has no part in."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

BLOCK_SIZE = 32
BLOCKS = 60
USABLE = BLOCKS - 1

#: A cache that the workload fills: requests wait and are preempted.
SMALL: dict[str, Any] = {
    "enforce_eager": True,
    "dtype": "bfloat16",
    "block_size": BLOCK_SIZE,
    "num_gpu_blocks_override": BLOCKS,
    "max_num_seqs": 24,
    "max_model_len": 1024,
    "seed": 0,
    "use_tqdm_on_load": False,
}
if os.environ.get("KVHOOK_ENGINE") == "gpu":
    # Many of these tests are about what vLLM itself counts, and with asynchronous scheduling it drops look-ups (0.26).
    # The tests of settings, of the core and of its batches under way have it on. An engine would take all memory.
    SMALL |= {"async_scheduling": False, "gpu_memory_utilization": 0.1}


class Call(NamedTuple):
    """One call of ``LLM.generate``: prompts as token ids, and what the sampling is to be."""

    prompts: list[list[int]]
    sampling: dict[str, Any]


def tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(2, 512) for _ in range(count)]


def workload() -> list[Call]:
    """Shared beginnings that hit, too much at once, single tokens, and different reasons to finish."""
    rng = random.Random(20)
    system = tokens(rng, 100)
    chats = [system + tokens(rng, rng.randrange(5, 60)) for _ in range(8)]
    return [
        Call(chats[:1], {"max_tokens": 4}),
        Call(chats, {"max_tokens": 20}),
        Call(chats, {"max_tokens": 20}),
        Call([tokens(rng, rng.randrange(60, 301)) for _ in range(40)], {"max_tokens": 64}),
        Call([tokens(rng, 33) for _ in range(3)], {"max_tokens": 1}),
        Call([tokens(rng, 50), tokens(rng, 70)], {"max_tokens": 9, "stop_token_ids": list(range(512))}),
    ]


def calm_workload() -> list[Call]:
    """What hits is known beforehand, however the engine's process happens to batch it: nothing is evicted, and the
    shared beginning has been computed before others ask for it."""
    rng = random.Random(21)
    system = tokens(rng, 100)
    return [
        Call([[*system, 7]], {"max_tokens": 4}),
        Call([system + tokens(rng, 20) for _ in range(6)], {"max_tokens": 12}),
    ]


#: Tokens that `calm_workload` finds in the cache: three whole blocks of the shared 100 tokens, six times.
CALM_HITS = 6 * 96


class Step(NamedTuple):
    """A call of ``LLMEngine.step`` as seen from outside: clocks around it, blocks in use after it, and how many tokens
    the scheduler gave out in it."""

    start_ns: int
    end_ns: int
    blocks_in_use: int
    tokens: int


@dataclasses.dataclass
class Seen:
    """A run as vLLM shows it: what came back, its own counters, its own objects."""

    outputs: list[Any] = dataclasses.field(default_factory=list)
    steps: list[Step] = dataclasses.field(default_factory=list)
    #: (tokens asked, tokens found, whether the request had been preempted) of each look into the prefix cache
    lookups: list[tuple[int, int, bool]] = dataclasses.field(default_factory=list)
    log: list[str] = dataclasses.field(default_factory=list)
    #: name -> by how much the counter rose; of a histogram (count, sum)
    counters: dict[str, int] = dataclasses.field(default_factory=dict)
    histograms: dict[str, tuple[int, float]] = dataclasses.field(default_factory=dict)
    finished_by_reason: dict[str, int] = dataclasses.field(default_factory=dict)
    error_of_get_metrics: str = ""
    loggers: list[str] = dataclasses.field(default_factory=list)

    @property
    def token_ids(self) -> list[list[int]]:
        return [list(one.outputs[0].token_ids) for one in self.outputs]

    @property
    def prompt_lengths(self) -> list[int]:
        return [len(one.prompt_token_ids) for one in self.outputs]


def run(llm: Any, calls: Sequence[Call]) -> list[Any]:
    """The outputs of these calls, temperature 0."""
    from vllm import SamplingParams  # type: ignore[import-not-found, unused-ignore]

    outputs = []
    for call in calls:
        params = SamplingParams(temperature=0, ignore_eos=True, **call.sampling)
        outputs += llm.generate([{"prompt_token_ids": p} for p in call.prompts], params, use_tqdm=False)
    return outputs


def observe(llm: Any, calls: Sequence[Call]) -> Seen:
    """Run a workload on an in-process engine and look at all that kvhook reports, by other ways."""
    seen = Seen()
    before = _metrics(llm, seen)
    seen.loggers = [type(logger).__name__ for logger in _loggers(llm.llm_engine)]
    with _count_steps(llm, seen), _note_lookups(llm, seen), _listen(seen):
        seen.outputs = run(llm, calls)
    after = _metrics(llm, seen)
    for (kind, name, reason), (count, total) in after.items():
        old_count, old_total = before.get((kind, name, reason), (0, 0.0))
        if kind == "Counter":
            seen.counters[name] = seen.counters.get(name, 0) + count - old_count
            if name == "vllm:request_success" and count > old_count:
                seen.finished_by_reason[reason] = count - old_count
        else:
            seen.histograms[name] = (count - old_count, total - old_total)
    for name, old_name in OLD_NAMES.items():
        if name not in seen.histograms and old_name in seen.histograms:
            seen.histograms[name] = seen.histograms[old_name]
    return seen


#: Metrics of today -> their name in releases that do not have them yet.
OLD_NAMES = {"vllm:inter_token_latency_seconds": "vllm:time_per_output_token_seconds"}


def _loggers(engine: Any) -> list[Any]:
    """vLLM's stat loggers: a manager's from 0.11, before it one logger of the engine."""
    if hasattr(engine, "logger_manager"):
        return engine.logger_manager.stat_loggers if engine.logger_manager else []
    return [engine.stat_logger] if engine.stat_logger else []


def _metrics(llm: Any, seen: Seen) -> dict[tuple[str, str, str], tuple[int, float]]:
    """Prometheus's counters and histograms, empty where vLLM refuses to give them."""
    found: dict[tuple[str, str, str], tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    try:
        metrics = llm.get_metrics()
    except AssertionError as error:
        seen.error_of_get_metrics = f"AssertionError: {error}"
        return found
    for metric in metrics:
        kind = type(metric).__name__
        key = kind, metric.name, metric.labels.get("finished_reason", "")
        count, total = found[key]
        if kind == "Counter":
            found[key] = count + metric.value, 0.0
        elif kind == "Histogram":
            found[key] = count + metric.count, total + metric.sum
    return found


@contextlib.contextmanager
def _count_steps(llm: Any, seen: Seen) -> Iterator[None]:
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    step, update_from_output = engine.step, scheduler.update_from_output
    given_out = 0

    def counted() -> Any:
        nonlocal given_out
        given_out, start = 0, time.monotonic_ns()
        try:
            return step()
        finally:
            end = time.monotonic_ns()
            used = sum(b.ref_cnt > 0 and not b.is_null for b in pool.blocks)
            seen.steps.append(Step(start, end, used, given_out))

    def noted(*args: Any, **kwargs: Any) -> Any:
        nonlocal given_out
        by_client = update_from_output(*args, **kwargs)
        given_out += sum(len(one.new_token_ids) for outputs in by_client.values() for one in outputs.outputs)
        return by_client

    with mock.patch.object(engine, "step", counted), mock.patch.object(scheduler, "update_from_output", noted):
        yield


@contextlib.contextmanager
def _note_lookups(llm: Any, seen: Seen) -> Iterator[None]:
    from vllm.v1.metrics.stats import PrefixCacheStats  # type: ignore[import-not-found, unused-ignore]

    if not hasattr(PrefixCacheStats, "record"):
        with _note_lookups_in_manager(llm, seen):
            yield
        return
    record = PrefixCacheStats.record

    def noted(stats: Any, num_tokens: int, num_hits: int, preempted: bool, *rest: Any, **more: Any) -> None:
        seen.lookups.append((num_tokens, num_hits, preempted))
        record(stats, num_tokens, num_hits, preempted, *rest, **more)

    with mock.patch.object(PrefixCacheStats, "record", noted):
        yield


@contextlib.contextmanager
def _note_lookups_in_manager(llm: Any, seen: Seen) -> Iterator[None]:
    """The same before 0.11.1, where the block manager counts by itself. On the object: kvhook is there, too."""
    manager = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
    get = manager.get_computed_blocks

    def noted(request: Any) -> Any:
        found = get(request)
        seen.lookups.append((request.num_tokens, found[1], request.status.name == "PREEMPTED"))
        return found

    with mock.patch.object(manager, "get_computed_blocks", noted):
        yield


@contextlib.contextmanager
def _listen(seen: Seen) -> Iterator[None]:
    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.log.append(record.getMessage())

    ear = Ear(logging.INFO)
    logging.getLogger("vllm").addHandler(ear)
    try:
        yield
    finally:
        logging.getLogger("vllm").removeHandler(ear)
