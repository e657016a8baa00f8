"""A job of two ranks that torchrun launches, an engine in each (``external_launcher``): both are given one trace, and
each records into a file of its own. vLLM has a scheduler in each rank, which do the same: a part of one engine each."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import kvhook
from tests.conftest import ROOT
from tests.engine import vllm_here
from tests.processes import output_of
from tests.workloads import CALM_HITS

RANKS = 2
#: Read here: a test finds none of kvhook's variables.
WANTED = os.environ.get("KVHOOK_RANKS") == "1"
pytestmark = [
    pytest.mark.skipif(not vllm_here.since(0, 16), reason="tried with 0.32"),
    pytest.mark.skipif(not WANTED, reason="two processes that each start vLLM take minutes: KVHOOK_RANKS=1 runs it"),
]


class Run(NamedTuple):
    """What came back in each rank, and where the traces are."""

    ranks: list[dict[str, Any]]
    folder: Path

    def file(self, rank: int) -> Path:
        return self.folder / f"run-rank{rank}.kvh"


@pytest.fixture(scope="module")
def run(engine_environment: dict[str, str], model: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("launched")
    output_of(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"),
            *("-m", "tests.engine.launched", model, folder / "run.kvh", folder),
        ],
        ROOT,
        {
            **engine_environment,
            "PYTHONPATH": f"{ROOT}:{engine_environment.get('PYTHONPATH', '')}",
            "KVHOOK_DIR": str(folder / "rings"),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        },
        timeout=500,
    )
    return Run([json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(RANKS)], folder)


def test_both_ranks_gave_the_same_answers(run: Run):
    """Otherwise they were not two parts of one engine."""
    assert run.ranks[0]["done"] == run.ranks[1]["done"]
    assert run.ranks[0]["pid"] != run.ranks[1]["pid"]


def test_each_rank_has_a_file_of_its_own_with_all_that_it_did(run: Run):
    assert sorted(path.name for path in run.folder.glob("run*.kvh") if ".core" not in path.name) == [
        "run-rank0.kvh",
        "run-rank1.kvh",
    ]
    for rank, about in enumerate(run.ranks):
        trace = kvhook.open(run.file(rank))
        (facts,) = trace.meta["engines"]
        assert (facts["rank"], facts["pid"]) == (rank, about["pid"])
        assert trace.steps()["num_prompt_tokens"].sum() == sum(prompt for prompt, _, _ in about["done"])
        assert trace.steps()["num_generation_tokens"].sum() == sum(len(tokens) for _, tokens, _ in about["done"])
        assert trace.summary().prefix_cache_hits == CALM_HITS == sum(cached for _, _, cached in about["done"])
        assert (trace.meta["records_lost"], trace.meta["damaged"], about["faults"]) == (0, 0, {})


def test_each_rank_has_the_core_of_its_own_process_and_its_peaks(run: Run):
    for rank, about in enumerate(run.ranks):
        trace = kvhook.open(run.file(rank))
        assert [facts["pid"] for facts in trace.cores().facts] == [about["pid"]]
        computed = sum(prompt + len(tokens) - 1 - cached for prompt, tokens, cached in about["done"])
        account: Any = trace.summary().core
        assert account.num_scheduled_tokens == computed
        assert "num_kv_blocks_peak" in (trace.steps().dtype.names or ())


def test_side_by_side_the_work_is_counted_once_and_each_can_be_asked(run: Run):
    both = kvhook.open(run.folder)
    once = sum(len(tokens) for _, tokens, _ in run.ranks[0]["done"])
    assert [facts["rank"] for facts in both.meta["engines"]] == [0, 1]
    assert [both.summary(engine).num_generation_tokens for engine in (0, 1)] == [once, once]
    assert (both.summary().num_generation_tokens, both.summary().replicas) == (once, 1)
    account: Any = both.summary().core
    assert (account.num_cores, account.num_requests) == (1, len(run.ranks[0]["done"]))
    assert len(both.cores()) == RANKS
