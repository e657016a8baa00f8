"""Two engines in one process, their cores in it or in processes of their own: what each did is told apart."""

from __future__ import annotations

import json
import sys
from typing import Any, NamedTuple

import pytest

import kvhook
from tests.conftest import ROOT
from tests.engine import vllm_here
from tests.engine.two_engines import BLOCKS
from tests.processes import output_of

BOTH = (0, 1)
pytestmark = pytest.mark.skipif(not vllm_here.since(0, 16), reason="older engines do not live together in one process")


class Run(NamedTuple):
    """What came back, and the trace."""

    results: dict[str, Any]
    trace: Any
    own: bool

    def sent(self, engine: int, what: int) -> list[int]:
        """Of each request of an engine: 0 the length of its prompt, 1 of its output, 2 the cached tokens."""
        return [one[what] for one in self.results["done"][engine]]


@pytest.fixture(scope="module", params=["in the process", "in processes of their own"])
def run(
    request: pytest.FixtureRequest,
    engine_environment: dict[str, str],
    model: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    folder = tmp_path_factory.mktemp("two")
    own = request.param != "in the process"
    output_of(
        [sys.executable, "-m", "tests.engine.two_engines", model, folder / "run.kvh", folder / "results.json"],
        ROOT,
        {
            **engine_environment,
            "PYTHONPATH": f"{ROOT}:{engine_environment.get('PYTHONPATH', '')}",
            "KVHOOK_DIR": str(folder / "rings"),
            "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(own)),
        },
        timeout=500,
    )
    return Run(json.loads((folder / "results.json").read_text()), kvhook.open(folder / "run.kvh"), own)


def test_every_record_says_which_engine_it_is_of(run: Run):
    assert [facts["engine"] for facts in run.trace.meta["engines"]] == [0, 1]
    assert [facts["num_kv_blocks"] for facts in run.trace.meta["engines"]] == [blocks - 1 for blocks in BLOCKS]
    assert set(run.trace.steps()["engine"].tolist()) == set(run.trace.requests()["engine"].tolist()) == {0, 1}
    for engine in BOTH:
        steps = run.trace.steps(engine)
        assert steps["step"].tolist() == list(range(len(steps)))
        assert steps["num_generation_tokens"].sum() == sum(run.sent(engine, 1))
        assert steps["num_prompt_tokens"].sum() == sum(run.sent(engine, 0))
        assert steps["num_prompt_tokens_cached"].sum() == sum(run.sent(engine, 2))
        requests = run.trace.requests(engine)
        assert sorted(requests["num_generation_tokens"].tolist()) == sorted(run.sent(engine, 1))
    assert (run.trace.meta["records_lost"], run.trace.meta["damaged"], run.results["faults"]) == (0, 0, {})


def test_the_second_engine_found_its_beginning_and_the_first_found_nothing(run: Run):
    """Otherwise nothing would show that their look-ups are kept apart."""
    assert [sum(run.sent(engine, 2)) > 0 for engine in BOTH] == [False, True]
    assert [run.trace.summary(engine).prefix_cache_hits for engine in BOTH] == [0, sum(run.sent(1, 2))]


def test_summaries_of_each_and_of_both(run: Run):
    generated = [sum(run.sent(engine, 1)) for engine in BOTH]
    assert [run.trace.summary(engine).num_generation_tokens for engine in BOTH] == generated
    assert run.trace.summary().num_generation_tokens == sum(generated)
    assert run.trace.summary().num_finished_reqs == sum(map(len, run.results["done"]))
    assert [run.trace.summary(engine).num_kv_blocks for engine in BOTH] == [blocks - 1 for blocks in BLOCKS]
    assert run.results["generated so far"] == [sum(generated), *generated]


def test_each_engine_s_core_is_its_own_and_both_are_the_account_of_the_run(run: Run):
    cores = run.trace.cores()
    assert (len(cores), cores.lost) == (2, 0)
    pids = {facts["pid"] for facts in cores.facts}
    assert len(pids) == (2 if run.own else 1)
    assert {facts["own_process"] for facts in cores.facts} == {run.own}
    for engine in BOTH:
        (facts,) = run.trace.select(engine=engine).cores().facts
        assert facts["num_kv_blocks"] == BLOCKS[engine] - 1
        core = run.trace.summary(engine).core
        assert core.num_requests == len(run.results["done"][engine])
        # each token that was neither found nor sampled last went through the model once
        computed = [p + g - 1 - c for p, g, c in run.results["done"][engine]]
        assert core.num_scheduled_tokens == sum(computed)
    both = run.trace.summary().core
    assert both.num_scheduled_tokens == sum(p + g - 1 - c for done in run.results["done"] for p, g, c in done)
    assert run.results["cores so far"] == [2, 1, 1]


def test_peaks_inside_steps_are_those_of_the_engine_s_own_core(run: Run):
    blocks_of = {facts["num_kv_blocks"]: core for core, facts in enumerate(run.trace.cores().facts)}
    for engine in BOTH:
        steps = run.trace.steps(engine)
        theirs = run.trace.cores().steps(blocks_of[BLOCKS[engine] - 1])
        told = steps["num_kv_blocks_peak"][steps["has_scheduler_stats"] == 1].tolist()
        assert told
        assert max(told) == theirs["num_kv_blocks_peak"].max()
        # at its end a request of n tokens holds the blocks of n - 1
        most = max(-(-(p + g - 1) // 32) for p, g, _ in run.results["done"][engine])
        assert max(told) >= most
        sent = theirs["num_kv_blocks_peak"][theirs["stats_number"] >= 0].tolist()
        assert told == sent[: len(told)]
