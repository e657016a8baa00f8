"""The collector on a real engine: against block arithmetic, vLLM's own counters, and its sources against each other."""

from __future__ import annotations

import json
import os
import random
from typing import Any

import pytest

import kvhook
from kvhook import VLLMMetricsCollector
from kvhook.collector import names
from tests.engine.conftest import MakeLLM
from tests.workloads import BLOCK_SIZE, USABLE, Call, observe, run, tokens, workload

SENT = [prompt for call in workload() for prompt in call.prompts]


def strict(answer: Any) -> str:
    return json.dumps(answer, allow_nan=False)


pytestmark = pytest.mark.usefixtures("nothing_installed")


# Basic collection: every key metric, from every source


class Collected:
    """The workload with vLLM's stats on, and what each source says of it at its end."""

    def __init__(self, make_llm: MakeLLM) -> None:
        kvhook.uninstall()
        with kvhook.install() as session:
            self.llm = make_llm(disable_log_stats=False)
            self.seen = observe(self.llm, workload())
            self.session = session
            self.collector = VLLMMetricsCollector(self.llm)
            self.stats = self.collector.get_comprehensive_stats()
            self.by_source = {
                names.HOOK: self.collector.collect_hook_stats(),
                names.INTERNAL: self.collector.collect_internal_stats(),
                names.REGISTRY: self.collector.collect_prometheus_metrics(),
            }
            self.registry = self.collector.get_prometheus_metrics()
            self.forced = {
                name: VLLMMetricsCollector(self.llm, source=name).get_comprehensive_stats() for name in self.by_source
            }


@pytest.fixture(scope="module")
def collected(make_llm: MakeLLM) -> Collected:
    return Collected(make_llm)


def test_every_key_metric_is_present_and_right(collected: Collected):
    counters, k = collected.seen.counters, collected.stats["key_metrics"]
    assert collected.stats["collection_method"] == names.HOOK
    assert k["prompt_tokens_total"] == k["num_prompt_tokens"] == sum(map(len, SENT))
    assert k["generation_tokens_total"] == sum(map(len, collected.seen.token_ids))
    assert k["gpu_prefix_cache_queries"] == counters["vllm:prefix_cache_queries"]
    assert k["gpu_prefix_cache_hits"] == counters["vllm:prefix_cache_hits"] > 0
    rate = counters["vllm:prefix_cache_hits"] / counters["vllm:prefix_cache_queries"]
    assert k["gpu_prefix_cache_hit_rate"] == k["prefix_cache_hit_rate"] == rate
    assert k["gpu_prefix_cache_hit_rate_percent"] == 100 * rate
    assert k["gpu_cache_usage_sys"] == k["gpu_cache_usage_percent"] == k["kv_cache_usage"] == 0
    assert k["kv_cache_usage_peak"] == max(s.blocks_in_use for s in collected.seen.steps) / USABLE == 1, (
        "the workload fills the cache"
    )
    assert k["num_running_sys"] == k["requests_running"] == k["num_waiting_sys"] == k["requests_waiting"] == 0
    assert not [name for name, value in k.items() if value is None]
    assert collected.stats["absent"] == {}


@pytest.mark.parametrize("source", [names.HOOK, names.INTERNAL, names.REGISTRY])
def test_all_sources_agree_at_the_end_of_a_run(collected: Collected, source: str):
    reference, other = collected.by_source[names.HOOK], collected.by_source[source]
    assert (other["collection_method"], other["stats_available"]) == (source, True)
    for key in [*(k.key for k in names.KEYS), *(v.name for v in names.VALUES if v.name != names.V0_RATE)]:
        assert other["metrics_found"][key] == reference["metrics_found"][key], key
    assert other["absent"] == {}


@pytest.mark.parametrize("source", [names.INTERNAL, names.REGISTRY])
def test_histograms_agree_bucket_for_bucket(collected: Collected, source: str):
    reference, other = (collected.by_source[s]["histogram_data"] for s in (names.HOOK, source))
    assert set(other) == set(reference)
    for name, histogram in other.items():
        mine = reference[name]
        assert (mine["count"], mine["buckets"]) == (histogram["count"], histogram["buckets"]), name
        assert mine["sum"] == pytest.approx(histogram["sum"], rel=1e-9)
        assert {"p50", "p90", "p99", "max"} <= set(mine), "the hook knows the values themselves"
        assert "p50" not in histogram


def test_histogram_analysis_is_that_of_vllms_histograms(collected: Collected):
    for stats in (collected.stats, *collected.forced.values()):
        a = stats["histogram_analysis"]
        for average, total, name in (
            ("avg_time_to_first_token_seconds", "total_ttft_requests", "vllm:time_to_first_token_seconds"),
            ("avg_time_per_output_token_seconds", "total_tpot_samples", "vllm:inter_token_latency_seconds"),
            ("avg_e2e_latency_seconds", "total_e2e_requests", "vllm:e2e_request_latency_seconds"),
        ):
            histogram = collected.registry[name]
            assert a[total] == histogram["count"]
            assert a[average] == pytest.approx(histogram["sum"] / histogram["count"], rel=1e-9)


def test_every_answer_is_json(collected: Collected):
    for answer in (
        collected.stats,
        collected.by_source,
        collected.registry,
        collected.forced,
        collected.collector.get_metrics_history(),
        collected.collector.debug_info(),
    ):
        strict(answer)


def test_environment_says_what_ran(collected: Collected):
    e = collected.stats["environment"]
    device = "cuda" if os.environ.get("KVHOOK_ENGINE") == "gpu" else "cpu"
    assert (e["device"], e["block_size"], e["num_gpu_blocks"]) == (device, BLOCK_SIZE, USABLE + 1)
    assert (e["enable_prefix_caching"], e["engine_core_in_this_process"]) == (True, True)


def test_the_history_of_the_hook_has_every_step(collected: Collected):
    rows = collected.collector.history()
    assert len(rows) == len(collected.seen.steps) == collected.stats["total_collections"]
    held = [step.blocks_in_use for step in collected.seen.steps]
    known = rows["kv_cache_usage"] == rows["kv_cache_usage"]
    assert (rows["kv_cache_usage"] * USABLE)[known].round(9).tolist() == [
        float(h) for h, k in zip(held, known, strict=True) if k
    ]


# Hit rate


def rounds(rng: random.Random, count: int) -> list[list[list[int]]]:
    shared = tokens(rng, 200)
    return [[shared[: 50 * (i % 4 + 1)] + tokens(rng, 30 + i) for _ in range(3)] for i in range(count)]


def expected_hits(prompts: list[list[int]], cache: set[tuple[int, ...]]) -> int:
    """Block arithmetic: whole blocks of the longest beginning that has been seen, but never the last token."""
    hits = 0
    for prompt in prompts:
        whole = [tuple(prompt[: BLOCK_SIZE * (i + 1)]) for i in range(len(prompt) // BLOCK_SIZE)]
        found = next((i for i, block in enumerate(whole) if block not in cache), len(whole))
        hits += BLOCK_SIZE * min(found, (len(prompt) - 1) // BLOCK_SIZE)
        cache.update(whole)
    return hits


@pytest.mark.parametrize("source", [None, names.INTERNAL, names.REGISTRY])
def test_hit_rate_progression_is_the_block_arithmetic_of_each_round(make_llm: MakeLLM, source: str | None):
    kvhook.install()
    llm = make_llm(num_gpu_blocks_override=400, disable_log_stats=source is None)
    collector = VLLMMetricsCollector(llm, source=source, collection_interval=3600)
    collector.start_monitoring()
    sent = rounds(random.Random(3), 6)
    for prompts in sent:
        run(llm, [Call(prompts, {"max_tokens": 2})])
        collector.collect_current_stats()
    collector.stop_monitoring()
    stats = collector.get_comprehensive_stats()
    cache: set[tuple[int, ...]] = set()
    hits = [expected_hits(prompts, cache) for prompts in sent]
    queries = [sum(map(len, prompts)) for prompts in sent]
    parts = stats["trend"]["between_collections"]
    assert [part["prefix_cache_hits"] for part in parts] == hits
    assert [part["prefix_cache_queries"] for part in parts] == queries
    assert [part["prefix_cache_hit_rate"] for part in parts] == [h / q for h, q in zip(hits, queries, strict=True)]
    assert parts[-1]["prefix_cache_hit_rate_so_far"] == sum(hits) / sum(queries)
    assert stats["key_metrics"]["gpu_prefix_cache_hit_rate"] == sum(hits) / sum(queries)
    assert stats["summary"]["prefix_cache_hits"] == sum(hits)


@pytest.mark.parametrize("source", [names.HOOK, names.INTERNAL, names.REGISTRY])
def test_prefix_caching_off_is_no_rate_of_0(make_llm: MakeLLM, source: str):
    kvhook.install()
    llm = make_llm(enable_prefix_caching=False, disable_log_stats=False)
    run(llm, workload()[:2])
    stats = VLLMMetricsCollector(llm, source=source).get_comprehensive_stats()
    assert stats["key_metrics"]["gpu_prefix_cache_hit_rate"] is None
    assert stats["key_metrics"]["gpu_prefix_cache_hit_rate_percent"] is None
    assert "enable_prefix_caching=False" in stats["absent"]["gpu_prefix_cache_hit_rate_percent"]
    assert "gpu_prefix_cache_hit_rate" not in stats["latest_stats"]["metrics_found"]
    assert stats["summary"]["prefix_cache_hit_rate"] is None
    progression = [*stats["trend"]["hit_rate_progression"], *stats["trend"]["between_collections"]]
    assert {p["prefix_cache_hit_rate"] for p in progression} <= {None}
    assert {p["prefix_cache_hit_rate_so_far"] for p in progression} <= {None}


# Usage


def test_usage_rises_peaks_where_the_arithmetic_says_and_returns_to_zero(make_llm: MakeLLM):
    kvhook.install()
    llm = make_llm()
    rng = random.Random(4)
    # the first of them, at its peak, has just filled a block
    lengths, generated = [58, 70, 100, 130], 40
    with VLLMMetricsCollector(llm) as collector:
        run(llm, [Call([tokens(rng, n) for n in lengths], {"max_tokens": generated})])
        stats = collector.get_comprehensive_stats()
    # the fullest step is the last but one: then the last two tokens have no place yet. The last token never has one,
    # since nothing reads it; that of the one before it is taken and given back in the last step
    blocks = sum(-(-(n + generated - 2) // BLOCK_SIZE) for n in lengths)
    usage = [p["kv_cache_usage"] for p in stats["trend"]["usage_progression"]]
    assert stats["key_metrics"]["kv_cache_usage_peak"] == pytest.approx(blocks / USABLE)
    assert usage[-1] == stats["key_metrics"]["gpu_cache_usage_percent"] == 0
    rising = usage[: usage.index(max(usage)) + 1]
    assert rising == sorted(rising)
    assert rising[0] < rising[-1]


def test_a_slow_poller_misses_the_peak_that_the_hook_finds(make_llm: MakeLLM):
    kvhook.install()
    llm = make_llm(disable_log_stats=False)
    # an interval longer than the run: it samples before and after
    poller = VLLMMetricsCollector(llm, source=names.REGISTRY, collection_interval=3600)
    hook = VLLMMetricsCollector(llm)
    poller.start_monitoring()
    hook.start_monitoring()
    run(llm, workload())
    poller.stop_monitoring()
    assert poller.get_comprehensive_stats()["key_metrics"]["kv_cache_usage_peak"] == 0
    assert hook.get_comprehensive_stats()["key_metrics"]["kv_cache_usage_peak"] == 1


# Where each source can be had


def test_stats_off_and_not_recorded_leaves_the_states_of_the_scheduler(make_llm: MakeLLM):
    llm = make_llm()
    collector = VLLMMetricsCollector(llm)
    collector.start_monitoring()
    run(llm, workload()[:2])
    stats = collector.get_comprehensive_stats()
    collector.stop_monitoring()
    assert stats["collection_method"] == names.INTERNAL
    assert stats["key_metrics"]["num_running_sys"] == stats["key_metrics"]["gpu_cache_usage_sys"] == 0
    assert stats["key_metrics"]["prompt_tokens_total"] is None
    assert "disable_log_stats=False" in stats["absent"]["prompt_tokens_total"]
    assert "kvhook.install() before LLM" in stats["latest_stats"]["debug_info"]["not_available"][names.HOOK]
    assert not kvhook.recording.installation.current_session(), "nothing was installed in vain"


def test_an_engine_with_stats_on_is_attached_by_start_monitoring(make_llm: MakeLLM):
    llm = make_llm(disable_log_stats=False)
    run(llm, workload()[:1])
    with VLLMMetricsCollector(llm) as collector:
        run(llm, workload()[:2])
        stats = collector.get_comprehensive_stats()
    assert stats["collection_method"] == names.HOOK
    assert stats["key_metrics"]["prompt_tokens_total"] == sum(len(p) for c in workload()[:2] for p in c.prompts)
    assert not kvhook.recording.installation.current_session(), "what the collector installed is gone with it"
    assert collector.get_comprehensive_stats()["key_metrics"] == stats["key_metrics"], "and can still be asked"


def test_the_collector_keeps_no_engine_alive_and_outlives_it(make_llm: MakeLLM):
    import gc
    import weakref

    kvhook.install()
    llm = make_llm(disable_log_stats=False)
    polled = VLLMMetricsCollector(llm, source=names.INTERNAL, collection_interval=0.01)
    hooked = VLLMMetricsCollector(llm)
    polled.start_monitoring()
    hooked.start_monitoring()
    thread = polled.sampling_thread
    assert thread is not None
    run(llm, workload()[:2])
    gone = weakref.ref(llm.llm_engine)
    del llm
    gc.collect()
    assert gone() is None
    thread.join(30)
    assert not thread.is_alive()
    assert polled.collect_current_stats()["collection_method"] == names.UNAVAILABLE
    assert hooked.collect_current_stats()["metrics_found"]["num_finished_reqs"] == 9
    polled.stop_monitoring()
