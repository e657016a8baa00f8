"""LLM as users have it: the engine's core in a process of its own, kvhook installed before vLLM is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine import vllm_here
from tests.processes import results_of
from tests.workloads import CALM_HITS, OLD_NAMES, USABLE, calm_workload

SENT = [prompt for call in calm_workload() for prompt in call.prompts]
both = pytest.mark.parametrize("which", ["off", "on"])


@pytest.fixture(scope="module")
def run(engine_environment: dict[str, str], model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("own")
    environment = {
        **engine_environment,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_LOG_STATS_INTERVAL": "0.001",
    }
    script = Path(__file__).with_name("own_process.py")
    return results_of(script, model, folder=folder, environment=environment, timeout=400)


@both
def test_exactly_the_columns_that_this_vllm_cannot_fill_are_absent(run: dict[str, Any], which: str):
    expected = {kind: vllm_here.absent(kind, which == "on") for kind in ("step", "request")}
    expected["step"] |= vllm_here.PEAKS
    assert run[which]["absent"] == {kind: sorted(columns) for kind, columns in expected.items()}


@both
def test_the_core_has_a_process_of_its_own(run: dict[str, Any], which: str):
    assert not run[which]["core in this process"]


@both
def test_sums_are_what_was_sent_and_returned(run: dict[str, Any], which: str):
    one, sums = run[which], run[which]["sums"]
    assert one["prompts"] == [len(prompt) for prompt in SENT]
    assert sums["num_prompt_tokens"] == sums["prefix_cache_queries"] == sum(one["prompts"])
    assert sums["num_generation_tokens"] == sum(one["generated"])
    assert sums["num_finished_reqs"] == sums["ttft_count"] == len(SENT)
    assert sums["itl_count"] == sum(one["generated"]) - len(SENT)


@both
def test_hits_are_the_whole_blocks_of_the_shared_beginning(run: dict[str, Any], which: str):
    sums = run[which]["sums"]
    assert sums["prefix_cache_hits"] == CALM_HITS
    if "num_prompt_tokens_cached" not in vllm_here.absent("step"):
        assert sums["num_prompt_tokens_cached"] == CALM_HITS


COUNTERS = {
    "num_prompt_tokens": "vllm:prompt_tokens",
    "num_prompt_tokens_cached": "vllm:prompt_tokens_cached",
    "num_generation_tokens": "vllm:generation_tokens",
    "prefix_cache_queries": "vllm:prefix_cache_queries",
    "prefix_cache_hits": "vllm:prefix_cache_hits",
    "num_preempted_reqs": "vllm:num_preemptions",
    "num_finished_reqs": "vllm:request_success",
    "ttft_count": "vllm:time_to_first_token_seconds",
    "itl_count": "vllm:inter_token_latency_seconds",
}


def test_sums_are_vllms_counters(run: dict[str, Any]):
    counters = run["on"]["counters"]
    for name, old_name in OLD_NAMES.items():
        counters.setdefault(name, counters.get(old_name))
    here = COUNTERS.keys() - vllm_here.absent("step")
    assert run["on"]["sums"] == {column: counters[COUNTERS[column]] for column in here}


def test_with_the_users_stats_off_the_sums_are_the_same(run: dict[str, Any]):
    assert run["off"]["sums"] == run["on"]["sums"]


@both
def test_one_record_per_call_of_step(run: dict[str, Any], which: str):
    one = run[which]
    assert one["steps"] == list(range(one["calls"]))
    assert one["in order"]
    assert one["lost"] == 0


@both
def test_usage_is_a_whole_number_of_blocks(run: dict[str, Any], which: str):
    one = run[which]
    assert one["blocks"] == USABLE
    possible = [vllm_here.usage(blocks, USABLE) for blocks in range(USABLE + 1)]
    assert all(min(abs(usage - p) for p in possible) < 1e-12 for usage in one["usage"])
    # one request of 101 tokens holds four blocks; at the end none is held
    assert one["usage"][0] == pytest.approx(possible[4])
    assert one["usage"][-1] == pytest.approx(possible[0])


@both
def test_first_token_of_each_request_is_that_of_its_output(run: dict[str, Any], which: str):
    requests = run[which]["requests"]
    if "time_to_first_token" in vllm_here.absent("request"):
        assert run[which]["first tokens"] == []
        assert "time_to_first_token" not in requests
    elif not vllm_here.outputs_have_metrics():
        # nothing to compare each with; their sum is compared with Prometheus's elsewhere
        assert run[which]["first tokens"] == []
        assert min(requests["time_to_first_token"]) > 0
    elif "request_id" in vllm_here.absent("request"):
        assert sorted(requests["time_to_first_token"]) == sorted(run[which]["first tokens"])
    else:
        by_id = dict(zip(requests["request_id"], requests["time_to_first_token"], strict=True))
        assert [by_id[i] for i in sorted(by_id)] == run[which]["first tokens"]


def test_log_lines_come_only_where_the_user_has_stats_on(run: dict[str, Any]):
    _, _, rest = run["log"].partition("=== engine 0")
    off, _, rest = rest.partition("=== engine 1")
    on, _, _ = rest.partition("=== end")
    # before 0.11 an engine behind LLM never logs its stats
    assert ("Avg prompt throughput" in on) == vllm_here.engine_has("logger_manager")
    assert "Avg prompt throughput" not in off


def test_nothing_failed_and_nothing_stays_patched(run: dict[str, Any]):
    assert run["faults"] == {}
    assert run["patched after"] == []


def test_the_core_s_process_wrote_no_ring(run: dict[str, Any]):
    rings = [Path(ring) for ring in run["rings"]]
    assert len(rings) == 2
    notes = {ring.with_name(f"{ring.name}.notes") for ring in rings}
    assert set(rings) <= set(rings[0].parent.iterdir()) <= {*rings, *notes}
