"""Stats of one step with a number of its own in every field that the release has, and where the numbers belong."""

from __future__ import annotations

from typing import Any

import pytest

from tests.contracts.core import STATS

V0_STATS = "vllm.engine.metrics_types"


def v1_stats() -> tuple[Any, Any]:
    """Stats of one step with a number of its own in every field that the release has."""
    stats: Any = __import__(STATS, fromlist=["x"])
    sched, iteration = stats.SchedulerStats(), stats.IterationStats()
    put(sched, num_running_reqs=3, num_waiting_reqs=5, num_skipped_waiting_reqs=2)
    put(sched, kv_cache_usage=0.5, gpu_cache_usage=0.5, num_corrupted_reqs=1, kv_cache_eviction_events=[1, 2, 3])
    prefix = getattr(sched, "prefix_cache_stats", None)
    put(prefix, requests=2, queries=40, hits=16, reset=True)
    put(prefix, preempted_requests=1, preempted_queries=9, preempted_hits=8)
    put(iteration, num_generation_tokens=4, num_preempted_reqs=1, num_corrupted_reqs=1)
    if hasattr(iteration, "prompt_token_stats"):
        put(iteration.prompt_token_stats, total=24, computed=8, cached_tokens=16, external_kv_transfer=6)
    else:
        put(iteration, num_prompt_tokens=24)
    put(iteration, time_to_first_tokens_iter=[0.1, 0.4, 0.25])
    itl = [0.01, 0.01]
    put(iteration, inter_token_latencies_iter=itl, time_per_output_tokens_iter=itl)
    one = stats.FinishedRequestStats()
    put(one, finish_reason=1, e2e_latency=2.0, num_prompt_tokens=12, num_generation_tokens=5, max_tokens_param=7)
    put(one, queued_time=0.5, prefill_time=0.25, inference_time=1.5, decode_time=1.25, mean_time_per_output_token=0.3)
    put(one, request_id="17", num_cached_tokens=8, num_preemptions=2)
    one.kvhook_ttft = 0.75
    iteration.finished_requests.append(one)
    return sched, iteration


def v0_stats(**more: Any) -> Any:
    stats: Any = __import__(V0_STATS, fromlist=["x"])
    one = stats.Stats()
    put(one, num_running_sys=3, num_waiting_sys=5, num_swapped_sys=2, gpu_cache_usage_sys=0.5, cpu_cache_usage_sys=0.25)
    put(one, gpu_prefix_cache_hit_rate=0.4, cpu_prefix_cache_hit_rate=-1, num_preemption_iter=1)
    put(one, num_prompt_tokens_iter=24, num_generation_tokens_iter=4.0, time_to_first_tokens_iter=[0.1, 0.4, 0.25])
    put(one, inter_token_latencies_iter=[0.01, 0.01], time_per_output_tokens_iter=[0.01, 0.01])
    put(one, time_e2e_requests=[2.0, 3.0], num_prompt_tokens_requests=[12, 13], num_generation_tokens_requests=[5, 6])
    put(one, finished_reason_requests=["length", "stop"], n_requests=[1, 1], max_tokens_requests=[7, None])
    put(one, time_queue_requests=[0.5, 0.1], time_prefill_requests=[0.25, 0.2], time_decode_requests=[1.25, 2.0])
    put(one, time_inference_requests=[1.5, 2.2])
    put(one, **more)
    return one


def put(target: Any, **values: Any) -> None:
    for name, value in values.items():
        if hasattr(target, name):
            setattr(target, name, value)


STEP = {
    "num_running_reqs": 3,
    "num_waiting_reqs": 5,
    "num_skipped_waiting_reqs": 2,
    "num_swapped_reqs": 2,
    "kv_cache_usage": 0.5,
    "cpu_kv_cache_usage": 0.25,
    "v0_prefix_cache_hit_rate": 0.4,
    "prefix_cache_requests": 2,
    "prefix_cache_queries": 40,
    "prefix_cache_hits": 16,
    "prefix_cache_reset": 1,
    "prefix_cache_preempted_requests": 1,
    "prefix_cache_preempted_queries": 9,
    "prefix_cache_preempted_hits": 8,
    "num_prompt_tokens": 24,
    "num_prompt_tokens_computed": 8,
    "num_prompt_tokens_cached": 16,
    "num_prompt_tokens_external": 6,
    "num_generation_tokens": 4,
    "num_preempted_reqs": 1,
    "num_corrupted_reqs": 1,
    "num_evicted_blocks_sampled": 3,
    "ttft_count": 3,
    "ttft_sum": 0.75,
    "ttft_min": 0.1,
    "ttft_max": 0.4,
    "itl_count": 2,
    "itl_sum": 0.02,
    "itl_min": 0.01,
    "itl_max": 0.01,
}
REQUEST = {
    "finish_reason": "length",
    "num_prompt_tokens": 12,
    "num_generation_tokens": 5,
    "max_tokens": 7,
    "queued_time": 0.5,
    "prefill_time": 0.25,
    "decode_time": 1.25,
    "inference_time": 1.5,
    "e2e_latency": 2.0,
    "time_to_first_token": 0.75,
    "mean_time_per_output_token": 0.3,
    "request_id": 17,
    "num_cached_tokens": 8,
    "num_preemptions": 2,
}


def expect(row: Any, numbers: dict[str, Any]) -> None:
    for column in row.dtype.names or ():
        if column in numbers:
            assert row[column] == pytest.approx(numbers[column]), column
