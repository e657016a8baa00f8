"""The engine core's own account on complete engines, with the core in this process, forked off and spawned.

What is expected comes from a scheduler that writes down what it does, from vLLM's outputs and from its counters.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import kvhook
from kvhook.analysis.join import core_step_of
from kvhook.records.core import CoreRecords
from tests.engine import vllm_here
from tests.engine.conftest import Recorded
from tests.entry_point import python_path
from tests.processes import output_of
from tests.workloads import USABLE, workload

PROMPTS = [prompt for call in workload() for prompt in call.prompts]
#: What the scheduler of the tests writes down and kvhook records by the same name.
COLUMNS = (
    "num_running_reqs",
    "num_kv_blocks_peak",
    "num_kv_blocks_cached",
    "num_kv_blocks_empty",
    "num_kv_blocks_used",
)
#: Columns that tell the time, or what kvhook took.
TIMES = {"t_schedule_ns", "t_scheduled_ns", "t_update_ns", "t_end_ns", "kvhook_ns"}


class Run(NamedTuple):
    """One engine: what its scheduler wrote down, what came of it, and what kvhook recorded."""

    notes: list[dict[str, Any]]
    results: dict[str, Any]
    trace: kvhook.Trace | None

    @property
    def cores(self) -> CoreRecords:
        assert self.trace is not None
        return self.trace.cores()


class Runs:
    """Makes each process when a test first asks for it."""

    def __init__(self, environment: dict[str, str], model: str, folder: Path) -> None:
        self._environment, self._model, self.folder = environment, model, folder
        self._python_path = python_path(folder / "plugin")
        self._runs: dict[str, Run] = {}

    def get(self, name: str) -> Run:
        """Of ``inside`` and ``forked``, with ``:bare`` or ``:blocks``; and ``spawned:steps:killed``."""
        if name not in self._runs:
            process = name.partition(":")[0]
            names = [name] if process == "spawned" else [f"{process}:bare", f"{process}:blocks"]
            self._make(process, names)
        return self._runs[name]

    def _make(self, process: str, names: list[str]) -> None:
        log = output_of(
            [sys.executable, Path(__file__).with_name("core_process.py"), self._model, self.folder, *names],
            self.folder,
            {
                **self._environment,
                "PYTHONPATH": self._python_path,
                "KVHOOK_DIR": str(self.folder / "rings"),
                "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(process != "inside")),
                "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn" if process == "spawned" else "fork",
            },
            timeout=500,
        )
        for name in names:
            stem = self.folder / name.replace(":", "-")
            notes = stem.with_suffix(".notes").read_text().splitlines()
            trace = stem.with_suffix(".kvh")
            results = json.loads(stem.with_suffix(".json").read_text()) | {"log": log}
            self._runs[name] = Run(
                list(map(json.loads, notes)), results, kvhook.open(trace) if trace.exists() else None
            )


@pytest.fixture(scope="module")
def runs(engine_environment: dict[str, str], model: str, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(engine_environment, model, tmp_path_factory.mktemp("cores"))


everywhere = pytest.mark.parametrize("where", ["inside:blocks", "forked:blocks", "spawned:steps:killed"])


@everywhere
def test_a_core_is_recorded_wherever_it_lives_and_nothing_fails(runs: Runs, where: str):
    run = runs.get(where)
    assert run.results["why none"] == ""
    assert run.results["lost"] == 0
    assert run.results["faults"] == run.results["faults after"] == {}
    assert len(run.cores) == 1
    assert "kvhook:" not in run.results["log"]
    # the session saw every step while it ran, and the file has them after it
    assert run.results["core steps"] == len(run.cores.steps()) == len(run.notes)


@everywhere
def test_every_step_is_what_the_scheduler_wrote_down(runs: Runs, where: str):
    run = runs.get(where)
    steps = run.cores.steps()
    for column in COLUMNS:
        assert steps[column].tolist() == [row[column] for row in run.notes], column
    assert steps["num_scheduled_tokens"].tolist() == [sum(row["tokens"].values()) for row in run.notes]
    assert steps["num_preempted_reqs"].tolist() == [len(row["preempted"]) for row in run.notes]
    assert steps["num_preempted_reqs"].sum() > 0
    assert steps["num_kv_blocks_evicted"].sum() > 0


@everywhere
def test_each_preemption_is_told_with_its_request_and_step(runs: Runs, where: str):
    run = runs.get(where)
    told = [(int(p["step"]), str(p["request_id"])) for p in run.cores.preemptions()]
    seen = [(step, name) for step, row in enumerate(run.notes) for name in row["preempted"]]
    assert sorted(told) == sorted(seen)


@everywhere
def test_requests_hold_what_was_sent_and_returned(runs: Runs, where: str):
    run = runs.get(where)
    lives = {int(life["request_id"]): life for life in run.cores.requests()}
    assert sorted(lives) == list(range(len(PROMPTS)))
    assert [int(lives[i]["num_prompt_tokens"]) for i in lives] == [len(PROMPTS[i]) for i in lives]
    assert [int(lives[i]["num_generation_tokens"]) for i in lives] == [len(run.results["outputs"][i]) for i in lives]
    first = {int(name): step for step, row in reversed(list(enumerate(run.notes))) for name in row["tokens"]}
    assert {i: int(lives[i]["first_scheduled_step"]) for i in lives} == first
    for life in lives.values():
        assert life["t_arrived_ns"] <= life["t_first_scheduled_ns"] < life["t_first_token_ns"] <= life["t_finished_ns"]


@everywhere
def test_front_end_and_core_are_joined_by_number_and_say_the_same(runs: Runs, where: str):
    trace = runs.get(where).trace
    assert trace is not None
    steps, core = trace.steps(), trace.cores().steps()
    joined = core_step_of(steps, core)
    told = joined >= 0
    assert told.sum() == (steps["has_scheduler_stats"] == 1).sum() > 0
    assert (np.diff(joined[told]) > 0).all()
    same = core[joined[told]]
    assert (steps["num_kv_blocks_used"][told] == same["num_kv_blocks_used"]).all()
    hits, found = steps["prefix_cache_hits"][told].sum(), same["num_found_tokens"].sum()
    # up to 0.11.0 a preempted request that waits for blocks counts in each step, later not among these
    assert hits <= found if vllm_here.since(0, 11, 1) else hits >= found > 0
    # the clock is the machine's: what the core did came before the front end told of it
    assert (same["t_schedule_ns"] <= steps["t_end_ns"][told]).all()


@everywhere
def test_the_peak_inside_each_step_is_in_the_front_ends_steps_too(runs: Runs, where: str):
    run = runs.get(where)
    assert run.trace is not None
    steps = run.trace.steps()
    if where.startswith("inside") and run.cores.facts[0].get("async_scheduling"):
        pytest.skip("a step of an engine in this process puts one batch together, and brings the result of another")
    joined = core_step_of(steps, run.cores.steps())
    told = joined >= 0
    peaks = np.array([row["num_kv_blocks_peak"] for row in run.notes])[joined[told]]
    assert peaks.max() == USABLE
    assert steps["num_kv_blocks_peak"][told].tolist() == peaks.tolist()
    assert steps["kv_cache_usage_peak"][told] == pytest.approx([vllm_here.usage(peak, USABLE) for peak in peaks])
    only = run.trace.steps(complete=True, columns=["kv_cache_usage_peak", "num_kv_blocks_peak"])
    assert only.dtype.names == ("kv_cache_usage_peak", "num_kv_blocks_peak")
    assert (
        only["num_kv_blocks_peak"].tolist() == steps["num_kv_blocks_peak"][steps["has_scheduler_stats"] == 1].tolist()
    )


def without_idle_steps(notes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Between two calls of `generate` a core of its own process makes a step in which nothing is scheduled, or none, as
    the next requests arrive late or soon. What such a step was told of finished requests goes to the next one."""
    found, finished = [], list[str]()
    for row in notes:
        finished = sorted([*finished, *row["finished"]])
        if row["tokens"]:
            found.append({**row, "finished": finished})
            finished = []
    return found


@pytest.mark.parametrize("process", ["inside", "forked"])
def test_outputs_and_vllms_schedule_are_the_same_with_and_without(runs: Runs, process: str):
    bare, recorded = runs.get(f"{process}:bare"), runs.get(f"{process}:blocks")
    assert len(bare.notes) > 100
    assert without_idle_steps(recorded.notes) == without_idle_steps(bare.notes)
    assert recorded.results["outputs"] == bare.results["outputs"]
    assert recorded.results["cached"] == bare.results["cached"]
    # what vLLM counts: with asynchronous scheduling, on a GPU, it misses look-ups in some releases
    assert bare.results["cached"] > 0 or recorded.cores.facts[0]["async_scheduling"]


@pytest.mark.parametrize("where", ["forked:blocks", "spawned:steps:killed"])
def test_a_core_of_its_own_process_says_what_one_in_this_process_says(runs: Runs, where: str):
    """The schedule is the same, but for steps in which nothing is scheduled."""
    inside, own = runs.get("inside:blocks"), runs.get(where)
    assert inside.results["outputs"] == own.results["outputs"]
    here, there = (run.cores.steps() for run in (inside, own))
    here, there = (table[table["num_scheduled_tokens"] > 0] for table in (here, there))
    # what happens between two steps is counted in the one that follows, and numbers count the empty steps too
    columns_there = {name for name in here.dtype.names or () if not name.endswith("_unix_ns")}
    compared = columns_there - TIMES - {"step", "stats_number", "num_finished_reqs"}
    for column in sorted(compared):
        assert here[column].tolist() == there[column].tolist(), column
    for table, columns in (
        ("requests", ("request_id", "num_cached_tokens", "num_prefill_tokens", "num_recomputed_tokens")),
        ("preemptions", ("request_id", "ordinal", "num_lost_tokens", "num_kv_blocks_freed")),
        ("lookups", ("request_id", "resumed", "num_tries", "num_tokens", "num_found_tokens", "miss_reason")),
    ):
        for column in columns:
            both = [getattr(run.cores, table)()[column].tolist() for run in (inside, own)]
            assert both[0] == both[1], (table, column)


@everywhere
def test_the_summary_takes_peak_preemptions_and_limits_from_the_core(runs: Runs, where: str):
    run = runs.get(where)
    assert run.trace is not None
    summary, text = run.trace.summary(), str(run.trace.summary())
    peak = max(row["num_kv_blocks_peak"] for row in run.notes)
    assert summary.kv_cache_usage_peak_in_step == pytest.approx(vllm_here.usage(peak, USABLE))
    assert summary.core is not None
    assert summary.core.num_preemptions == sum(len(row["preempted"]) for row in run.notes)
    again = int(run.cores.steps()["num_recomputed_tokens"].sum())
    assert f"{again:,} tokens computed again" in text
    asked = run.cores.lookups()
    evicted = int(asked["num_evicted_tokens"][asked["resumed"] == 0].sum())
    assert ("evicted too early" in text) == (evicted > 0)
    assert not evicted or f"evicted too early: {evicted:,} tokens computed again" in text
    assert "limited by" in text
    assert "no KV blocks" in text


def test_the_ledger_is_the_same_in_both(runs: Runs):
    inside, own = (runs.get(where).cores.blocks() for where in ("inside:blocks", "forked:blocks"))
    assert len(inside) > 1000
    for column in ("request", "block", "index", "event", "group"):
        assert inside[column].tolist() == own[column].tolist(), column
    # digests have a key of their own in each recording, and tell the same contents apart
    assert not set(inside["digest"][inside["digest"] > 0].tolist()) & set(own["digest"].tolist())
    both = [np.unique(events["digest"], return_inverse=True)[1] for events in (inside, own)]
    assert len(set(zip(*(b.tolist() for b in both), strict=True))) == both[0].max() + 1


def test_a_core_that_is_killed_leaves_its_steps_and_the_front_end_ends_as_without_kvhook(runs: Runs):
    run = runs.get("spawned:steps:killed")
    client: Any = importlib.import_module("vllm.v1.engine.core_client").MPClient
    watched = hasattr(client, "start_engine_core_monitor")
    assert run.results["error"] == ("EngineDeadError" if watched else "not noticed")
    assert run.results["faults after"] == {}
    assert len(run.cores.steps()) == len(run.notes)
    assert run.cores.lost == 0
    assert len(run.cores.requests()) == len(PROMPTS)


def test_preemptions_and_cached_tokens_are_what_vllm_says(stats_on_core: Recorded):
    preemptions, lookups = stats_on_core.session.preemptions(), stats_on_core.session.lookups()
    assert len(preemptions) == stats_on_core.seen.counters["vllm:num_preemptions"] > 0
    first = lookups[lookups["resumed"] == 0]
    if vllm_here.since(0, 10):
        cached = sum(output.num_cached_tokens or 0 for output in stats_on_core.seen.outputs)
        assert first["num_found_tokens"].sum() == cached > 0


def test_every_request_has_a_life_and_its_work_adds_up(stats_on_core: Recorded):
    lives = stats_on_core.session.core_requests()
    outputs = {int(o.request_id): o for o in stats_on_core.seen.outputs}
    assert sorted(lives["request_id"].tolist()) == sorted(outputs)
    for life in lives:
        assert life["finish_reason"] == outputs[int(life["request_id"])].outputs[0].finish_reason
    needed = sum(len(o.prompt_token_ids) + len(o.outputs[0].token_ids) - 1 for o in stats_on_core.seen.outputs)
    core = stats_on_core.session.core_steps()
    done = core["num_prefill_tokens"].sum() + core["num_decode_tokens"].sum() + lives["num_cached_tokens"].sum()
    assert done == needed
    assert core["num_recomputed_tokens"].sum() == lives["num_recomputed_tokens"].sum() > 0
    assert (np.diff(core["t_schedule_ns"]) > 0).all()


@pytest.fixture(scope="module")
def stats_on_core(make_llm: Any) -> Recorded:
    from tests.engine.conftest import record

    return record(make_llm, {"core": "blocks"}, disable_log_stats=False)


@pytest.mark.parametrize("where", ["inside:blocks", "forked:blocks"])
def test_the_run_can_be_played_again_with_other_caches(runs: Runs, where: str):
    """With its own blocks the replay finds for each request what the engine found, preemptions and all."""
    trace = runs.get(where).trace
    assert trace is not None
    told = trace.what_if(blocks=[USABLE, 10 * USABLE])
    here, large = told.sizes
    assert here.query_tokens == sum(map(len, PROMPTS))
    assert told.hit_tokens is not None
    if where == "inside:blocks":
        assert told.reproduced
        assert here.num_preemptions == len(trace.cores().preemptions()) > 0
        assert here.hit_tokens == told.hit_tokens
    assert abs(here.hit_tokens - told.hit_tokens) <= 0.01 * here.query_tokens
    assert not here.exact, "requests are preempted"
    assert large.hit_tokens >= here.hit_tokens
