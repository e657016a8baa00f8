"""What kvhook says of vLLM's V0 engine, against what vLLM counts, returns and holds in its own objects.

Collected only where VLLM_USE_V1=0. V0 counts other things than V1, so its truths are its own: Prometheus, the block
manager and the queues of the scheduler, and the metrics on each output.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

import kvhook
from tests.engine import vllm_here
from tests.engine.conftest import MakeLLM
from tests.workloads import run, workload

SENT = [prompt for call in workload() for prompt in call.prompts]
BLOCKS: int = vllm_here.options().get("num_gpu_blocks_override", 0)
THROUGHPUT = "Avg prompt throughput"


class Step(NamedTuple):
    """A call of ``LLMEngine.step`` as seen from outside, and the scheduler after it."""

    start_ns: int
    end_ns: int
    blocks_in_use: int
    running: int
    waiting: int
    swapped: int


class Run(NamedTuple):
    """A workload as vLLM shows it, and as kvhook recorded it, if it did."""

    outputs: list[Any]
    steps_seen: list[Step]
    #: Prometheus's counters; of histograms "..._count" and "..._sum"
    metrics: dict[str, float]
    finished_by_reason: dict[str, int]
    loggers: list[str]
    session: Any = None
    steps: Any = None
    requests: Any = None
    summary: Any = None

    @property
    def token_ids(self) -> list[list[int]]:
        return [list(one.outputs[0].token_ids) for one in self.outputs]

    def total(self, column: str) -> int:
        return int(self.steps[column].sum())


def prometheus() -> tuple[dict[str, float], dict[str, int]]:
    """Everything that vLLM has counted in this process; and the finished requests by reason."""
    from prometheus_client import REGISTRY

    found: dict[str, float] = defaultdict(float)
    reasons: dict[str, int] = {}
    for metric in REGISTRY.collect():
        for sample in metric.samples if metric.name.startswith("vllm:") else ():
            if sample.name.endswith(("_total", "_count", "_sum")):
                found[sample.name] += sample.value
            if sample.name == "vllm:request_success_total":
                reasons[sample.labels["finished_reason"]] = int(sample.value)
    return found, reasons


@contextlib.contextmanager
def watched(llm: Any, seen: list[Step]) -> Iterator[None]:
    engine = llm.llm_engine
    (scheduler,) = engine.scheduler
    step = engine.step

    def counted() -> Any:
        start = time.monotonic_ns()
        try:
            return step()
        finally:
            end = time.monotonic_ns()
            held = scheduler.block_manager.num_total_gpu_blocks - scheduler.block_manager.get_num_free_gpu_blocks()
            queues = (len(q) for q in (scheduler.running, scheduler.waiting, scheduler.swapped))
            seen.append(Step(start, end, held, *queues))

    engine.step = counted
    try:
        yield
    finally:
        del engine.step


def observe(make_llm: MakeLLM, **options: Any) -> Run:
    gc.collect()
    llm = make_llm(**options)
    seen: list[Step] = []
    before, reasons_before = prometheus()
    with watched(llm, seen):
        outputs = run(llm, workload())
    after, reasons = prometheus()
    return Run(
        outputs,
        seen,
        {name: value - before.get(name, 0) for name, value in after.items()},
        {r: n - reasons_before.get(r, 0) for r, n in reasons.items() if n > reasons_before.get(r, 0)},
        sorted(type(logger).__name__ for logger in getattr(llm.llm_engine, "stat_loggers", {}).values()),
    )


def record(make_llm: MakeLLM, **options: Any) -> Run:
    kvhook.uninstall()
    with kvhook.install() as session:
        ran = observe(make_llm, **options)
        return ran._replace(
            session=session, steps=session.steps(), requests=session.requests(), summary=session.summary()
        )


@pytest.fixture(scope="module")
def bare(make_llm: MakeLLM) -> Run:
    """The workload without kvhook, vLLM's stats on."""
    kvhook.uninstall()
    return observe(make_llm, disable_log_stats=False)


@pytest.fixture(scope="module")
def bare_default(make_llm: MakeLLM) -> Run:
    """The workload without kvhook, vLLM's stats off, as LLM has them by default."""
    kvhook.uninstall()
    return observe(make_llm)


@pytest.fixture(scope="module")
def stats_on(make_llm: MakeLLM) -> Run:
    return record(make_llm, disable_log_stats=False)


@pytest.fixture(scope="module")
def stats_off(make_llm: MakeLLM) -> Run:
    return record(make_llm)


@pytest.fixture(params=["stats_on", "stats_off"])
def recorded(request: pytest.FixtureRequest) -> Run:
    """Both."""
    both: Run = request.getfixturevalue(request.param)
    return both


# The workload is what it is meant to be: else the tests below would pass on nothing.


def test_the_workload_fills_the_cache_waits_and_preempts(bare: Run):
    assert bare.metrics["vllm:num_preemptions_total"] > 0
    assert max(step.blocks_in_use for step in bare.steps_seen) > 0.9 * BLOCKS
    assert max(step.waiting for step in bare.steps_seen) > 0
    assert set(bare.finished_by_reason) == {"length", "stop"}


# Sums


COUNTERS = {
    "num_prompt_tokens": "vllm:prompt_tokens_total",
    "num_generation_tokens": "vllm:generation_tokens_total",
    "num_preempted_reqs": "vllm:num_preemptions_total",
}


@pytest.mark.parametrize("column", COUNTERS)
def test_sum_over_the_steps_is_vllms_counter(stats_on: Run, column: str):
    assert stats_on.total(column) == stats_on.metrics[COUNTERS[column]]


@pytest.mark.parametrize("column", COUNTERS)
def test_with_the_users_stats_off_the_same_workload_gives_the_same_sum(stats_off: Run, bare: Run, column: str):
    assert stats_off.total(column) == bare.metrics[COUNTERS[column]]


def test_generated_tokens_are_the_lengths_of_the_outputs(recorded: Run):
    lengths = [len(ids) for ids in recorded.token_ids]
    assert recorded.total("num_generation_tokens") == sum(lengths)
    assert sorted(recorded.requests["num_generation_tokens"].tolist()) == sorted(lengths)


def test_finished_requests_are_the_requests_sent(recorded: Run):
    assert len(recorded.requests) == recorded.total("num_finished_reqs") == len(SENT)
    assert sorted(recorded.requests["num_prompt_tokens"].tolist()) == sorted(map(len, SENT))


def test_finish_reasons(recorded: Run, bare: Run):
    returned = Counter(one.outputs[0].finish_reason for one in recorded.outputs)
    assert recorded.summary.finished_by_reason == dict(returned) == bare.finished_by_reason


# The cache and the queues


def test_usage_is_blocks_in_use_over_all_blocks(recorded: Run):
    held = np.array([step.blocks_in_use for step in recorded.steps_seen])
    with_stats = recorded.steps["has_scheduler_stats"] == 1
    assert with_stats.sum() > 0.9 * len(held)
    # V0 keeps no null block
    assert (recorded.steps["num_kv_blocks"] == BLOCKS).all()
    assert recorded.steps["num_kv_blocks_used"][with_stats].tolist() == held[with_stats].tolist()
    assert recorded.steps["kv_cache_usage"][with_stats] == pytest.approx(held[with_stats] / BLOCKS, abs=1e-12)
    assert recorded.summary.kv_cache_usage_peak == pytest.approx(max(held) / BLOCKS)
    assert recorded.summary.block_size == 16


@pytest.mark.parametrize(
    ("column", "queue"),
    [("num_running_reqs", "running"), ("num_waiting_reqs", "waiting"), ("num_swapped_reqs", "swapped")],
)
def test_queues_are_those_of_the_scheduler(recorded: Run, column: str, queue: str):
    with_stats = recorded.steps["has_scheduler_stats"] == 1
    seen = np.array([getattr(step, queue) for step in recorded.steps_seen])
    assert recorded.steps[column][with_stats].tolist() == seen[with_stats].tolist()


def test_prefix_caching_is_off_and_has_no_hit_rate(recorded: Run):
    assert recorded.summary.prefix_cache_hit_rate is None
    assert not np.any(recorded.steps["v0_prefix_cache_hit_rate"] >= 0)


# Steps


def test_one_record_per_call_of_step_within_its_call(recorded: Run):
    assert recorded.steps["step"].tolist() == list(range(len(recorded.steps_seen)))
    assert recorded.summary.records_lost == recorded.summary.records_dropped == 0
    outside = np.array([(step.start_ns, step.end_ns) for step in recorded.steps_seen])
    assert (outside[:, 0] <= recorded.steps["t_start_ns"]).all()
    assert (recorded.steps["t_start_ns"] < recorded.steps["t_end_ns"]).all()
    assert (recorded.steps["t_end_ns"] <= outside[:, 1]).all()


# Latencies


SERIES = {
    "time_to_first_token": ("ttft", "vllm:time_to_first_token_seconds"),
    "inter_token_latency": ("itl", "vllm:time_per_output_token_seconds"),
}


@pytest.mark.parametrize("series", SERIES)
def test_every_single_latency_is_there(stats_on: Run, series: str):
    prefix, metric = SERIES[series]
    count, total = stats_on.metrics[f"{metric}_count"], stats_on.metrics[f"{metric}_sum"]
    values, counts = stats_on.session.latencies(series)
    assert stats_on.total(f"{prefix}_count") == counts.sum() == count > 0
    assert math.fsum(values * counts) == pytest.approx(total, rel=1e-9)
    assert math.fsum(stats_on.steps[f"{prefix}_sum"]) == pytest.approx(total, rel=1e-9)


HISTOGRAMS = {
    "queued_time": "vllm:request_queue_time_seconds",
    "prefill_time": "vllm:request_prefill_time_seconds",
    "decode_time": "vllm:request_decode_time_seconds",
    "inference_time": "vllm:request_inference_time_seconds",
    "e2e_latency": "vllm:e2e_request_latency_seconds",
    "num_prompt_tokens": "vllm:request_prompt_tokens",
    "num_generation_tokens": "vllm:request_generation_tokens",
    "max_tokens": "vllm:request_params_max_tokens",
}


@pytest.mark.parametrize("column", HISTOGRAMS)
def test_request_column_adds_up_to_vllms_histogram(stats_on: Run, column: str):
    metric = HISTOGRAMS[column]
    assert len(stats_on.requests) == stats_on.metrics[f"{metric}_count"]
    assert math.fsum(stats_on.requests[column]) == pytest.approx(stats_on.metrics[f"{metric}_sum"], rel=1e-9)


def test_times_are_those_of_the_outputs(recorded: Run):
    of_outputs = [one.metrics for one in recorded.outputs]
    queued = sorted(m.first_scheduled_time - m.arrival_time for m in of_outputs)
    prefill = sorted(m.first_token_time - m.first_scheduled_time for m in of_outputs)
    assert sorted(recorded.requests["queued_time"].tolist()) == queued
    assert sorted(recorded.requests["prefill_time"].tolist()) == prefill


# Harmless


def test_outputs_and_steps_are_the_same_with_and_without(recorded: Run, bare: Run, bare_default: Run):
    assert recorded.token_ids == bare.token_ids == bare_default.token_ids
    assert [s.blocks_in_use for s in recorded.steps_seen] == [s.blocks_in_use for s in bare.steps_seen]


def test_nothing_failed_inside(recorded: Run):
    assert recorded.session.faults == {}


def test_stats_on_vllms_loggers_are_those_without_kvhook(stats_on: Run, bare: Run):
    assert "PrometheusStatLogger" in bare.loggers
    assert stats_on.loggers == bare.loggers
    same = {n: v for n, v in bare.metrics.items() if not n.endswith(("_sum", "seconds_bucket"))}
    assert {n: stats_on.metrics[n] for n in same} == same


def test_stats_off_vllm_counts_and_logs_nothing(stats_off: Run, bare_default: Run):
    assert not any(bare_default.metrics.values())
    assert not any(stats_off.metrics.values())
    assert not {"PrometheusStatLogger", "LoggingStatLogger"} & set(stats_off.loggers)


def test_uninstall_puts_back_what_was_there(make_llm: MakeLLM):
    del make_llm
    import vllm.engine.llm_engine as module

    def names() -> dict[str, Any]:
        return dict(vars(module)) | {f"LLMEngine.{name}": value for name, value in vars(module.LLMEngine).items()}

    kvhook.uninstall()
    before = names()
    with kvhook.install():
        patched = names()
        assert patched["LLMEngine.step"] is not before["LLMEngine.step"]
    kvhook.uninstall()
    assert [name for name, value in names().items() if value is not before.get(name)] == []


def test_exactly_the_columns_that_v0_cannot_fill_are_absent(recorded: Run):
    (engine,) = recorded.session.meta["engines"]
    for kind, rows in (("step", recorded.steps), ("request", recorded.requests)):
        reasons = engine["absent"][kind]
        assert set(reasons) == vllm_here.V0_ABSENT[kind]
        assert not set(rows.dtype.names) & reasons.keys()
        assert all(reasons.values())
