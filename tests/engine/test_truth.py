"""What kvhook says of a real engine, against what vLLM counts, returns and holds in its own objects."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

import kvhook
from tests.engine import vllm_here
from tests.engine.conftest import MakeLLM, Recorded
from tests.workloads import BLOCK_SIZE, USABLE, Call, Seen, run, tokens, workload

SENT = [prompt for call in workload() for prompt in call.prompts]

# The workload is what it is meant to be: else the tests below would pass on nothing.


def test_the_workload_fills_the_cache_waits_hits_and_preempts(stats_on: Recorded):
    seen = stats_on.seen
    assert seen.counters["vllm:num_preemptions"] > 0
    assert seen.counters["vllm:prefix_cache_hits"] > 0
    assert any(again and found for _, found, again in seen.lookups), "a preempted request finds some of its blocks"
    assert max(step.blocks_in_use for step in seen.steps) == USABLE
    assert max(stats_on.steps["num_waiting_reqs"]) > 0
    assert set(seen.finished_by_reason) == {"length", "stop"}


# Sums


COUNTERS = {
    "num_prompt_tokens": "vllm:prompt_tokens",
    "num_prompt_tokens_cached": "vllm:prompt_tokens_cached",
    "num_generation_tokens": "vllm:generation_tokens",
    "prefix_cache_queries": "vllm:prefix_cache_queries",
    "prefix_cache_hits": "vllm:prefix_cache_hits",
    "num_preempted_reqs": "vllm:num_preemptions",
    "mm_cache_queries": "vllm:mm_cache_queries",
    "num_corrupted_reqs": "vllm:corrupted_requests",
}


@pytest.mark.parametrize("column", COUNTERS)
def test_sum_over_the_steps_is_vllms_counter(stats_on: Recorded, column: str):
    if stats_on.lacks(column):
        return
    if stats_on.lacks(column):
        return
    # a counter that vLLM does not make has counted nothing
    assert stats_on.total(column) == stats_on.seen.counters.get(COUNTERS[column], 0)


@pytest.mark.parametrize("column", COUNTERS)
def test_with_the_users_stats_off_the_same_workload_gives_the_same_sum(stats_off: Recorded, bare: Seen, column: str):
    if stats_off.lacks(column):
        return
    if stats_off.lacks(column):
        return
    # against vLLM's counters in a run that kvhook had no part in
    assert stats_off.total(column) == bare.counters.get(COUNTERS[column], 0)


def test_finished_requests_are_the_requests_sent(recorded: Recorded):
    assert len(recorded.requests) == recorded.total("num_finished_reqs") == len(SENT)
    assert recorded.summary.num_finished_reqs == len(SENT)


def test_generated_tokens_are_the_lengths_of_the_outputs(recorded: Recorded):
    lengths = [len(ids) for ids in recorded.seen.token_ids]
    assert recorded.total("num_generation_tokens") == sum(lengths)
    of_requests, returned = recorded.per_request("num_generation_tokens", lambda one: len(one.outputs[0].token_ids))
    assert of_requests == returned


def test_prompt_tokens_are_the_lengths_of_the_prompts(recorded: Recorded):
    assert recorded.total("num_prompt_tokens") == sum(map(len, SENT))
    of_requests, returned = recorded.per_request("num_prompt_tokens", lambda one: len(one.prompt_token_ids))
    assert of_requests == returned
    assert recorded.seen.prompt_lengths == [len(prompt) for prompt in SENT]


def test_computed_and_cached_prompt_tokens_make_up_all(recorded: Recorded):
    if recorded.lacks("num_prompt_tokens_computed", "num_prompt_tokens_cached"):
        return
    if recorded.lacks("num_prompt_tokens_computed", "num_prompt_tokens_cached"):
        return
    steps = recorded.steps
    assert (steps["num_prompt_tokens_computed"] + steps["num_prompt_tokens_cached"] == steps["num_prompt_tokens"]).all()


def test_cached_tokens_of_each_request_are_those_of_its_output(recorded: Recorded):
    if recorded.lacks("num_cached_tokens", kind="request"):
        return
    of_requests, returned = recorded.per_request("num_cached_tokens", lambda one: one.num_cached_tokens)
    assert of_requests == returned


def test_lookups_of_new_and_of_readmitted_requests_are_kept_apart(recorded: Recorded):
    new = np.array([lookup[:2] for lookup in recorded.seen.lookups if not lookup[2]])
    again = np.array([lookup[:2] for lookup in recorded.seen.lookups if lookup[2]])
    s = recorded.summary
    if recorded.lacks("prefix_cache_preempted_requests"):
        # this vLLM counts them together, and says so
        together = np.concatenate([new, again])
        assert recorded.total("prefix_cache_requests") == len(together)
        assert [s.prefix_cache_queries, s.prefix_cache_hits] == together.sum(axis=0).tolist()
        assert s.prefix_cache_preempted_queries is None
        return
    assert recorded.total("prefix_cache_requests") == len(new)
    assert recorded.total("prefix_cache_preempted_requests") == len(again)
    assert [s.prefix_cache_queries, s.prefix_cache_hits] == new.sum(axis=0).tolist()
    assert [s.prefix_cache_preempted_queries, s.prefix_cache_preempted_hits] == again.sum(axis=0).tolist()
    assert s.prefix_cache_hit_rate == new[:, 1].sum() / new[:, 0].sum()
    assert s.preempted_share_of_hits == again[:, 1].sum() / (again[:, 1].sum() + new[:, 1].sum())


def test_preemptions_of_the_requests_are_the_preemptions_of_the_steps(recorded: Recorded, bare: Seen):
    if recorded.lacks("num_preemptions", kind="request"):
        return
    assert recorded.requests["num_preemptions"].sum() == bare.counters["vllm:num_preemptions"]


def test_finish_reasons(recorded: Recorded, bare: Seen):
    returned = Counter(one.outputs[0].finish_reason for one in recorded.seen.outputs)
    assert recorded.summary.finished_by_reason == dict(returned) == bare.finished_by_reason


# The cache


@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 63, 64, 65, 100, 257, 600])
def test_a_prompt_sent_twice_hits_all_its_whole_blocks_but_never_its_last_token(twice: dict[int, Any], n: int):
    first, second = twice[n]
    expected = BLOCK_SIZE * ((n - 1) // BLOCK_SIZE)
    assert (first["prefix_cache_queries"], first["prefix_cache_hits"]) == (n, 0)
    assert (second["prefix_cache_queries"], second["prefix_cache_hits"]) == (n, expected)
    # absent in releases that do not split prompt tokens; which these are, test_columns_that_are_absent... tells
    assert second.get("num_prompt_tokens_cached", expected) == expected
    assert second.get("num_prompt_tokens_computed", n - expected) == n - expected


@pytest.fixture(scope="module")
def twice(make_llm: MakeLLM) -> dict[int, Any]:
    """Length of a prompt -> what its first and its second sending added."""
    import random

    columns = [f"prefix_cache_{what}" for what in ("queries", "hits")]
    columns += [f"num_prompt_tokens_{what}" for what in ("cached", "computed")]
    rng, got = random.Random(5), {}
    kvhook.uninstall()
    with kvhook.install() as session:
        llm = make_llm()

        def send(prompt: list[int]) -> dict[str, int]:
            before = len(session.steps())
            run(llm, [Call([prompt], {"max_tokens": 1})])
            steps = session.steps()[before:]
            return {c: int(steps[c].sum()) for c in columns if c in (steps.dtype.names or ())}

        for n in (1, 2, 31, 32, 33, 63, 64, 65, 100, 257, 600):
            llm.reset_prefix_cache()
            prompt = tokens(rng, n)
            got[n] = send(prompt), send(prompt)
    return got


def test_usage_is_blocks_in_use_over_blocks_that_can_be_used(recorded: Recorded):
    held = [step.blocks_in_use for step in recorded.seen.steps]
    with_stats = recorded.steps["has_scheduler_stats"] == 1
    assert with_stats.sum() > 0.9 * len(held)
    assert (recorded.steps["num_kv_blocks"] == USABLE).all()
    assert recorded.steps["num_kv_blocks_used"][with_stats].tolist() == np.array(held)[with_stats].tolist()
    usage = vllm_here.usage(np.array(held)[with_stats], USABLE)
    assert recorded.steps["kv_cache_usage"][with_stats] == pytest.approx(usage, abs=1e-12)
    assert recorded.summary.kv_cache_usage_peak == pytest.approx(max(usage))
    assert recorded.summary.num_kv_blocks == USABLE
    assert recorded.summary.block_size == BLOCK_SIZE


def test_a_reset_of_the_cache_is_in_the_next_step(make_llm: MakeLLM):
    with kvhook.install() as session:
        llm = make_llm()
        run(llm, workload()[:1])
        steps = len(session.steps())
        assert session.steps()["prefix_cache_reset"].sum() == 0
        assert llm.reset_prefix_cache() in (True, None)  # older releases say nothing
        run(llm, workload()[:1])
        after = session.steps()["prefix_cache_reset"][steps:]
        assert after.sum() == 1
        assert session.steps()["prefix_cache_hits"].sum() == 0
    kvhook.uninstall()


def test_prefix_caching_off_gives_no_hit_rate_and_says_why(make_llm: MakeLLM):
    with kvhook.install() as session:
        run(make_llm(enable_prefix_caching=False), workload()[:2])
        summary = session.summary()
    assert summary.prefix_caching is False
    assert summary.prefix_cache_hit_rate is None
    assert summary.prefix_cache_hits == 0
    assert "off (enable_prefix_caching=False)" in str(summary)


# Steps


def test_one_record_per_call_of_step_numbered_without_a_gap(recorded: Recorded):
    assert recorded.steps["step"].tolist() == list(range(len(recorded.seen.steps)))
    assert recorded.summary.records_lost == recorded.summary.records_dropped == 0


def test_each_record_lies_within_its_call(recorded: Recorded):
    outside = np.array([(step.start_ns, step.end_ns) for step in recorded.seen.steps])
    start, end = recorded.steps["t_start_ns"], recorded.steps["t_end_ns"]
    assert (outside[:, 0] <= start).all()
    assert (start < end).all()
    assert (end <= outside[:, 1]).all()
    assert (end[:-1] <= start[1:]).all()


def test_running_and_waiting_are_never_more_than_were_sent(recorded: Recorded):
    steps = recorded.steps[recorded.steps["has_scheduler_stats"] == 1]
    assert steps["num_running_reqs"].max() <= 24
    assert (steps["num_running_reqs"] + steps["num_waiting_reqs"]).max() <= max(len(c.prompts) for c in workload())
    assert (steps["num_running_reqs"][-1], steps["num_waiting_reqs"][-1]) == (0, 0)
    assert steps["num_kv_blocks_used"][-1] == 0


# Latencies


SERIES = {
    "time_to_first_token": "vllm:time_to_first_token_seconds",
    "inter_token_latency": "vllm:inter_token_latency_seconds",
}


@pytest.mark.parametrize("series", SERIES)
def test_every_single_latency_is_there(stats_on: Recorded, series: str):
    values, counts = stats_on.session.latencies(series)
    count, total = stats_on.seen.histograms[SERIES[series]]
    assert counts.sum() == count
    assert math.fsum(values * counts) == pytest.approx(total, rel=1e-9)
    d = getattr(stats_on.summary, series)
    assert d.count == count
    assert d.mean == pytest.approx(total / count, rel=1e-9)


@pytest.mark.parametrize("prefix", ["ttft", "itl"])
def test_steps_count_and_sum_their_latencies(stats_on: Recorded, prefix: str):
    name = {"ttft": "vllm:time_to_first_token_seconds", "itl": "vllm:inter_token_latency_seconds"}[prefix]
    count, total = stats_on.seen.histograms[name]
    assert stats_on.total(f"{prefix}_count") == count
    assert math.fsum(stats_on.steps[f"{prefix}_sum"]) == pytest.approx(total, rel=1e-9)
    some = stats_on.steps[stats_on.steps[f"{prefix}_count"] > 0]
    means = some[f"{prefix}_sum"] / some[f"{prefix}_count"]
    assert (some[f"{prefix}_min"] <= means * (1 + 1e-12)).all()
    assert (means <= some[f"{prefix}_max"] * (1 + 1e-12)).all()


def test_a_latency_for_each_token_and_each_request(recorded: Recorded):
    lengths = [len(ids) for ids in recorded.seen.token_ids]
    assert recorded.total("ttft_count") == len(SENT)
    assert recorded.total("itl_count") == sum(lengths) - len(SENT)


def test_time_to_first_token_of_each_request_is_that_of_its_output(recorded: Recorded):
    if recorded.lacks("time_to_first_token", kind="request"):
        return
    of_requests = recorded.requests["time_to_first_token"].tolist()
    if vllm_here.outputs_have_metrics():
        of_requests, returned = recorded.per_request("time_to_first_token", lambda one: one.metrics.first_token_latency)
        assert of_requests == returned
    values, counts = recorded.session.latencies("time_to_first_token")
    assert sorted(np.repeat(values, counts)) == sorted(of_requests)


HISTOGRAMS = {
    "queued_time": "vllm:request_queue_time_seconds",
    "prefill_time": "vllm:request_prefill_time_seconds",
    "decode_time": "vllm:request_decode_time_seconds",
    "inference_time": "vllm:request_inference_time_seconds",
    "e2e_latency": "vllm:e2e_request_latency_seconds",
    "mean_time_per_output_token": "vllm:request_time_per_output_token_seconds",
    "num_prompt_tokens": "vllm:request_prompt_tokens",
    "num_generation_tokens": "vllm:request_generation_tokens",
    "num_preemptions": "vllm:request_num_preemptions",
    "max_tokens": "vllm:request_params_max_tokens",
}


@pytest.mark.parametrize("column", HISTOGRAMS)
def test_request_column_adds_up_to_vllms_histogram(stats_on: Recorded, column: str):
    if stats_on.lacks(column, kind="request"):
        return
    count, total = stats_on.seen.histograms[HISTOGRAMS[column]]
    assert len(stats_on.requests) == count
    assert math.fsum(stats_on.requests[column]) == pytest.approx(total, rel=1e-9)


def test_times_of_each_request_are_those_of_its_output(recorded: Recorded):
    # vLLM's own time stamps, on the outputs that it returns
    parts = {
        "queued_time": ("scheduled_ts", "queued_ts"),
        "prefill_time": ("first_token_ts", "scheduled_ts"),
        "decode_time": ("last_token_ts", "first_token_ts"),
        "inference_time": ("last_token_ts", "scheduled_ts"),
    }
    if not vllm_here.outputs_have_metrics():
        assert {one.metrics for one in recorded.seen.outputs} == {None}
        r = recorded.requests
        assert r["prefill_time"] + r["decode_time"] == pytest.approx(r["inference_time"], abs=1e-9)
        assert (r["queued_time"] + r["inference_time"] <= r["e2e_latency"]).all()
        return
    for column, (to, since) in parts.items():
        of_requests, returned = recorded.per_request(
            column,
            lambda one, a=since, b=to: getattr(one.metrics, b) - getattr(one.metrics, a),  # type: ignore[misc]
        )
        assert of_requests == returned, column
