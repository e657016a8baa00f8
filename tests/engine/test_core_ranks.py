"""AsyncLLM with two data-parallel ranks: each rank's core has its own account, and together they are complete."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.engine import vllm_here
from tests.engine.ranks import REQUESTS
from tests.processes import results_of

#: Read here: a test finds none of kvhook's variables.
WANTED = os.environ.get("KVHOOK_RANKS") == "1"


@pytest.fixture(scope="module")
def run(engine_environment: dict[str, str], model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if not WANTED:
        pytest.skip("three processes that each start vLLM take minutes: KVHOOK_RANKS=1 runs it")
    if not vllm_here.since(0, 11):
        pytest.skip("vLLM before 0.11 has no data parallelism on a CPU")
    folder = tmp_path_factory.mktemp("ranks")
    environment = {
        **engine_environment,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_WORKER_MULTIPROCESSING_METHOD": "fork",
    }
    script = Path(__file__).with_name("ranks.py")
    return results_of(script, model, folder=folder, environment=environment, timeout=500)


def test_each_rank_is_a_core_with_its_number_and_process(run: dict[str, Any]):
    assert run["why none"] == ""
    assert sorted(facts["data_parallel_rank"] for facts in run["facts"]) == [0, 1]
    assert len({run["pid"], *(facts["pid"] for facts in run["facts"])}) == 3
    assert run["lost"] == 0
    assert run["faults"] == {}


def test_every_request_lived_in_one_of_them_with_its_tokens(run: dict[str, Any]):
    lived = {key: (prompt, generated) for requests in run["requests"] for key, prompt, generated in requests}
    assert len(lived) == sum(map(len, run["requests"])) == REQUESTS
    assert all(run["requests"]), "one of them had nothing to do"
    assert lived == {run["keys"][name]: (prompt, len(tokens)) for name, prompt, tokens in run["done"]}
    needed = sum(prompt + len(tokens) - 1 for _, prompt, tokens in run["done"])
    assert 0 < sum(map(sum, run["tokens"])) <= needed  # less what was found in the prefix cache


def test_the_front_ends_records_have_the_peaks_of_their_rank(run: dict[str, Any]):
    front = run["front"]
    if "num_kv_blocks_peak" not in front:
        # with asynchronous scheduling, on a GPU, the two see the blocks in use at different moments
        assert "do not agree" in run["why no peaks"]
        return
    of_rank = {facts["data_parallel_rank"]: peaks for facts, peaks in zip(run["facts"], run["peaks"], strict=True)}
    for rank, peaks in of_rank.items():
        rows = zip(*(front[n] for n in ("engine_index", "has_scheduler_stats", "num_kv_blocks_peak")), strict=True)
        told = [peak for index, has, peak in rows if index == rank and has]
        assert told
        # each of them in the same order: steps whose stats were not sent are left out
        rest = iter(peaks)
        assert all(peak in rest for peak in told)
