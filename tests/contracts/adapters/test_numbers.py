"""Numbers that are put into vLLM's stats come out right, in the right columns; blocks, and what only V0 has."""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvhook
from kvhook.adapters.config import engine_facts, null_block
from tests.contracts.adapters.engines import engines_of, recorder_of
from tests.contracts.adapters.expected import BY_NAME, ENGINES
from tests.contracts.behaviour import config_of
from tests.contracts.loader import stubs
from tests.contracts.made_stats import REQUEST, STEP, expect, put, v0_stats, v1_stats
from tests.contracts.releases import between

pytestmark = pytest.mark.usefixtures("fresh")


@pytest.mark.parametrize(("release", "name"), ENGINES)
def test_numbers_that_are_put_in_come_out_in_the_right_columns(release: str, name: str, tmp_path: Path):
    v0 = name == "v0"
    with stubs(engines_of(release)):
        recorder = recorder_of(name, tmp_path)
        for start in (100, 200):
            recorder.functions.record(*((v0_stats(),) if v0 else v1_stats()))
            recorder.functions.publish(start, start + 50)
        recorder.functions.publish(300, 350)
        trace = kvhook.open(recorder.ring.path)
    steps, requests = trace.steps(), trace.requests()
    assert len(steps) == 3
    # 0.8 counts whole blocks, of 16 tokens here
    unit = 16 if between(release, "0.8.0", "0.8.5.post1") and not v0 else 1
    skipped = 2 if between(release, "0.20.0") else 0
    numbers = STEP | {
        "prefix_cache_queries": 40 * unit,
        "prefix_cache_hits": 16 * unit,
        "num_waiting_reqs": 5 + skipped,
        "num_finished_reqs": 2 if v0 else 1,
    }
    for i in (0, 1):
        expect(steps[i], numbers | {"step": i, "t_start_ns": 100 + 100 * i, "t_end_ns": 150 + 100 * i})
    assert steps["has_scheduler_stats"].tolist() == steps["has_iteration_stats"].tolist() == [1, 1, 0]
    # a step without stats: nothing happened in it, and its state is not known
    last = steps[2]
    assert (last["num_generation_tokens"], last["num_finished_reqs"], last["ttft_count"]) == (0, 0, 0)
    assert (last["num_running_reqs"], last["num_kv_blocks_used"]) == (-1, -1)
    assert np.isnan(last["kv_cache_usage"])
    assert sorted(trace.latencies("time_to_first_token")[0]) == [0.1, 0.1, 0.25, 0.25, 0.4, 0.4]
    expect(requests[0], REQUEST)
    assert requests["step"].tolist() == ([0, 0, 1, 1] if v0 else [0, 1])
    if v0:
        assert requests["finish_reason"].tolist()[:2] == ["length", "stop"]
        assert requests["num_prompt_tokens"].tolist()[:2] == [12, 13]


# Blocks


#: how many of 11 blocks can be used, and what vLLM calls the usage when 4 of them are
BLOCKS = (
    ("v0", "0.6.0", "0.10.2", 11, 4 / 11),
    ("v1", "0.8.0", "0.8.2", 11, 4 / 11),
    ("v1", "0.8.3", "0.10.1.1", 10, 5 / 11),
    ("v1", "0.10.2", None, 10, 4 / 10),
)


@pytest.mark.parametrize(("release", "name"), ENGINES)
def test_blocks_in_use_are_right_whatever_usage_means_in_a_release(release: str, name: str, tmp_path: Path):
    family = BY_NAME[name].family
    usable, usage = next(b[3:] for b in BLOCKS if b[0] == family and between(release, b[1], b[2]))
    with stubs(engines_of(release)):
        recorder = recorder_of(name, tmp_path)
        if family == "v0":
            recorder.functions.record(v0_stats(gpu_cache_usage_sys=usage))
        else:
            sched, iteration = v1_stats()
            put(sched, kv_cache_usage=usage, gpu_cache_usage=usage)
            recorder.functions.record(sched, iteration)
        recorder.functions.publish(1, 2)
        (step,) = kvhook.open(recorder.ring.path).steps()
    assert (step["num_kv_blocks"], step["num_kv_blocks_used"]) == (usable, 4)
    assert step["kv_cache_usage"] == pytest.approx(usage)


class PoolWithoutNullBlock:
    """As in 0.8.2."""

    def __init__(self) -> None:
        self.num_gpu_blocks = 3

    def get_num_free_blocks(self) -> int:
        return 2

    def get_usage(self) -> float:
        return 1.0 - (self.get_num_free_blocks() / self.num_gpu_blocks)


class PoolThatCountsIt(PoolWithoutNullBlock):
    """As in 0.8.3."""

    def __init__(self) -> None:
        self.null_block = 0


class PoolThatLeavesItOut(PoolThatCountsIt):
    """As in 0.10.2."""

    def get_usage(self) -> float:
        total_gpu_blocks = self.num_gpu_blocks - 1
        if not total_gpu_blocks:
            return 0
        return 1.0 - (self.get_num_free_blocks() / total_gpu_blocks)


@pytest.mark.parametrize(
    ("pool", "answer"),
    [(PoolWithoutNullBlock, (False, False)), (PoolThatCountsIt, (True, False)), (PoolThatLeavesItOut, (True, True))],
)
@pytest.mark.parametrize("release", ["0.8.0", "0.9.2", "0.32.0"])
def test_the_null_block_is_asked_of_the_code_before_the_version(pool: type, answer: Any, release: str):
    module = types.ModuleType("vllm.v1.core.block_pool")
    vars(module)["BlockPool"] = pool
    with stubs(engines_of(release) | {module.__name__: module}):
        assert null_block() == answer


def test_blocks_of_several_ranks_are_those_of_one_or_not_known():
    config = config_of(num_gpu_blocks=44, data_parallel_size=4)
    with stubs(engines_of("0.32.0")):
        adapter = BY_NAME["v1-async"]

        def blocks(**engine: Any) -> Any:
            return engine_facts(adapter, types.SimpleNamespace(vllm_config=config, **engine))["num_kv_blocks"]

        assert blocks(engine_core=types.SimpleNamespace(core_engines=[b"0", b"1", b"2", b"3"])) == 10
        assert blocks(engine_core=types.SimpleNamespace(core_engines=[b"0"] * 3)) is None
        assert blocks(engine_core=types.SimpleNamespace()) == 43
        assert blocks() is None


# V0's own


def test_v0_on_a_cpu_has_its_usage_wherever_the_release_puts_it(tmp_path: Path):
    with stubs(engines_of("0.9.2")):
        recorder = recorder_of("v0", tmp_path, on_gpu=False)
        for gpu, cpu, gpu_rate, cpu_rate in ((0.5, 0.0, 0.3, -1), (0.0, 0.5, -1, 0.3), (0.0, 0.0, -1, -1)):
            rates = {"gpu_prefix_cache_hit_rate": gpu_rate, "cpu_prefix_cache_hit_rate": cpu_rate}
            recorder.functions.record(v0_stats(gpu_cache_usage_sys=gpu, cpu_cache_usage_sys=cpu, **rates))
            recorder.functions.publish(1, 2)
        trace = kvhook.open(recorder.ring.path)
    assert trace.steps()["kv_cache_usage"].tolist() == [0.5, 0.5, 0.0]
    assert trace.steps()["v0_prefix_cache_hit_rate"].tolist()[:2] == [0.3, 0.3]
    assert np.isnan(trace.steps()["v0_prefix_cache_hit_rate"][2])
    assert "nothing to swap" in trace.meta["absent"]["cpu_kv_cache_usage"]


def test_v0_requests_with_several_outputs_are_one_row_each(tmp_path: Path):
    several = {
        "num_generation_tokens_requests": [5, 6, 1, 2, 3],
        "finished_reason_requests": ["length", "stop", "stop", "stop", "stop"],
        "n_requests": [2, 3],
    }
    with stubs(engines_of("0.7.3")):
        recorder = recorder_of("v0", tmp_path)
        recorder.functions.record(v0_stats(**several))
        recorder.functions.publish(1, 2)
        requests = kvhook.open(recorder.ring.path).requests()
    assert requests["num_generation_tokens"].tolist() == [11, 6]
    assert requests["finish_reason"].tolist() == ["length", "stop"]


def test_v0_numbers_that_belong_to_no_request_for_certain_are_left_blank(tmp_path: Path):
    with stubs(engines_of("0.7.3")):
        recorder = recorder_of("v0", tmp_path)
        recorder.functions.record(v0_stats(time_queue_requests=[0.5], num_generation_tokens_requests=[1, 2, 3]))
        recorder.functions.publish(1, 2)
        requests = kvhook.open(recorder.ring.path).requests()
    assert np.isnan(requests["queued_time"]).all()
    assert np.isnan(requests["time_to_first_token"]).all()
    assert requests["num_generation_tokens"].tolist() == [-1, -1]
    assert requests["e2e_latency"].tolist() == [2.0, 3.0]


def test_v0_two_stats_in_one_step_are_one_record(tmp_path: Path):
    with stubs(engines_of("0.9.2")):
        recorder = recorder_of("v0", tmp_path)
        first, second = v0_stats(num_running_sys=9), v0_stats(num_running_sys=1, num_generation_tokens_iter=10)
        before = dataclasses.asdict(first), dataclasses.asdict(second)
        recorder.functions.record(first)
        recorder.functions.record(second)
        recorder.functions.publish(1, 2)
        assert (dataclasses.asdict(first), dataclasses.asdict(second)) == before
        trace = kvhook.open(recorder.ring.path)
        (step,) = trace.steps()
    assert (step["num_running_reqs"], step["num_generation_tokens"], step["num_prompt_tokens"]) == (1, 14, 48)
    assert (step["num_finished_reqs"], len(trace.requests())) == (4, 4)
