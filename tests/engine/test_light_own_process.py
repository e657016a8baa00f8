"""Level light with the engine's core in a process of its own: LLM as users have it, and AsyncLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine import vllm_here
from tests.entry_point import python_path
from tests.processes import results_of
from tests.workloads import CALM_HITS, USABLE, calm_workload

SENT = [prompt for call in calm_workload() for prompt in call.prompts]
both = pytest.mark.parametrize("which", ["LLM", "AsyncLLM"])


@pytest.fixture(scope="module")
def run(engine_environment: dict[str, str], model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("light")
    environment = {
        **engine_environment,
        "PYTHONPATH": python_path(folder / "plugin"),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_LOG_STATS_INTERVAL": "0.001",
        # AsyncLLM takes the outputs of a step in slices of so many
        "VLLM_V1_OUTPUT_PROC_CHUNK_SIZE": "2",
    }
    script = Path(__file__).with_name("light_processes.py")
    return results_of(script, model, folder=folder, environment=environment, timeout=400)


@both
def test_sums_are_what_was_sent_and_returned(run: dict[str, Any], which: str):
    one, sums = run[which], run[which]["sums"]
    assert one["prompts"] == [len(prompt) for prompt in SENT]
    assert sums["num_prompt_tokens"] == sums["prefix_cache_queries"] == sum(one["prompts"])
    assert sums["num_generation_tokens"] == sum(one["generated"])
    assert sums["num_finished_reqs"] == len(SENT)
    assert sums["num_preempted_reqs"] == 0


@both
def test_the_core_is_recorded_and_has_computed_what_was_neither_found_nor_sampled_last(run: dict[str, Any], which: str):
    one = run[which]
    assert one["why no core"] == ""
    needed = sum(one["prompts"]) - CALM_HITS + sum(one["generated"]) - len(one["generated"])
    assert one["scheduled in the core"] == needed
    assert one["ended in the core"] == len(SENT)


@both
def test_hits_are_the_whole_blocks_of_the_shared_beginning(run: dict[str, Any], which: str):
    sums = run[which]["sums"]
    assert sums["prefix_cache_hits"] == CALM_HITS
    if "num_prompt_tokens_cached" not in vllm_here.absent("step"):
        assert sums["num_prompt_tokens_cached"] == CALM_HITS


@both
def test_usage_is_a_whole_number_of_blocks(run: dict[str, Any], which: str):
    usage = run[which]["usage"]
    possible = [vllm_here.usage(blocks, USABLE) for blocks in range(USABLE + 1)]
    assert all(min(abs(u - p) for p in possible) < 1e-12 for u in usage)
    # one request of 101 tokens holds four blocks; at the end none is held
    assert usage[0] == pytest.approx(possible[4])
    assert usage[-1] == pytest.approx(possible[0])
    assert max(run[which]["running"]) <= 6


@both
def test_records_are_numbered_without_a_gap_and_all_at_level_light(run: dict[str, Any], which: str):
    one = run[which]
    assert one["steps"] == list(range(len(one["steps"])))
    assert one["levels"] == [1]
    assert one["lost"] == 0
    assert one["faults"] == {}
    assert "light: no latencies, no single requests" in one["text"]


@both
def test_the_front_end_makes_no_stats(run: dict[str, Any], which: str):
    assert run[which]["log_stats"] == [False, False]
    assert "Avg prompt throughput" not in run["log"]


def test_the_core_has_a_process_of_its_own(run: dict[str, Any]):
    assert not run["LLM"]["core in this process"]


def test_one_record_per_call_of_step_with_its_time(run: dict[str, Any]):
    assert len(run["LLM"]["steps"]) == run["LLM"]["calls"]
    assert run["LLM"]["timed"]
    assert run["LLM"]["metrics"] == [False] * len(SENT)


def test_on_the_event_loop_each_message_of_the_core_is_a_record_without_a_time_of_its_own(run: dict[str, Any]):
    assert not run["AsyncLLM"]["timed"]
    assert run["AsyncLLM"]["adapter"] == "v1-async-light"
    # the first call brings 4 tokens one by one, the second 12
    assert len(run["AsyncLLM"]["steps"]) >= 4 + 12


def test_both_give_the_same_tokens(run: dict[str, Any]):
    assert run["LLM"]["tokens"] == run["AsyncLLM"]["tokens"]


def test_an_aborted_request_has_ended_too(run: dict[str, Any]):
    # two more than before: the aborted one, and the one after it
    assert run["AsyncLLM"]["finished after an abort"] == len(SENT) + 2
    assert run["AsyncLLM"]["faults after an abort"] == {}
