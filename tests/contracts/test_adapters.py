"""The adapters against every release: what is patched, which columns are live, and that the numbers come out right.

What is expected is written down here as changes, release by release, and not taken from the adapters.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvhook
from kvhook import hooks
from kvhook.adapters import ADAPTERS, NEWEST
from kvhook.adapters.config import engine_facts, null_block
from kvhook.adapters.fit import resolve
from kvhook.adapters.table import Adapter
from kvhook.errors import StatsOffError
from kvhook.recording.recorder import Recorder
from kvhook.schema import REQUEST_FIELDS, STEP_FIELDS
from tests.contracts.behaviour import VllmLogger, animate, config_of, make_engine
from tests.contracts.extracting.stored import version_key
from tests.contracts.loader import build_stub_modules, load, mutated, releases, stubs
from tests.contracts.release_facts import ReleaseFacts

pytestmark = pytest.mark.usefixtures("fresh")

ENGINE = "vllm.v1.engine.llm_engine"
ASYNC = "vllm.v1.engine.async_llm"
LOGGERS = "vllm.v1.metrics.loggers"
STATS = "vllm.v1.metrics.stats"
V0_ENGINE = "vllm.engine.llm_engine"
V0_STATS = "vllm.engine.metrics_types"
CLIENT = "vllm.v1.engine.core_client"
ALL = releases()
BY_NAME = {a.name: a for a in ADAPTERS}


def between(release: str, first: str, last: str | None = None) -> bool:
    low, high = version_key(first), version_key(last or ALL[-1])
    return low <= version_key(release) <= high


def since(first: str, last: str | None = None) -> list[str]:
    return [release for release in ALL if between(release, first, last)]


# What is expected

#: first release, last release, the adapters that serve it
SERVED_BY = (
    ("0.6.0", "0.7.3", "v0"),
    ("0.8.0", "0.8.5.post1", "v0 v1-0.8 v1-async-0.8"),
    ("0.9.0", "0.9.2", "v0 v1-0.9 v1-async-0.9"),
    ("0.10.0", "0.10.2", "v0 v1-0.9 v1-async"),
    ("0.11.0", None, "v1 v1-async"),
)

#: columns of a family, and from which release on there are more
STEP_COLUMNS = {
    "v0": {
        "0.6.0": "num_running_reqs num_waiting_reqs num_swapped_reqs kv_cache_usage cpu_kv_cache_usage "
        "v0_prefix_cache_hit_rate num_prompt_tokens num_generation_tokens num_preempted_reqs",
    },
    "v1": {
        "0.8.0": "num_running_reqs num_waiting_reqs kv_cache_usage prefix_cache_requests prefix_cache_queries "
        "prefix_cache_hits prefix_cache_reset num_prompt_tokens num_generation_tokens num_preempted_reqs",
        "0.8.3": "num_draft_tokens num_accepted_tokens",
        "0.8.5": "num_drafts",
        "0.11.1": "num_corrupted_reqs prefix_cache_preempted_requests prefix_cache_preempted_queries "
        "prefix_cache_preempted_hits connector_prefix_cache_queries connector_prefix_cache_hits "
        "mm_cache_queries mm_cache_hits",
        "0.12.0": "num_evicted_blocks_sampled",
        "0.16.0": "num_prompt_tokens_computed num_prompt_tokens_cached num_prompt_tokens_external",
        "0.20.0": "num_skipped_waiting_reqs",
    },
}
REQUEST_COLUMNS = {
    "v0": {
        "0.6.0": "finish_reason num_prompt_tokens num_generation_tokens e2e_latency",
        "0.6.4": "max_tokens queued_time prefill_time decode_time inference_time time_to_first_token",
    },
    "v1": {
        "0.8.0": "finish_reason num_prompt_tokens num_generation_tokens max_tokens queued_time prefill_time "
        "decode_time inference_time e2e_latency",
        "0.10.2": "time_to_first_token",
        "0.11.0": "mean_time_per_output_token",
        "0.13.0": "num_cached_tokens",
        "0.20.0": "request_id",
        "0.30.0": "num_preemptions",
    },
}
#: what kvhook knows by itself, or works out
OWN = {
    "step": "step engine_index t_start_ns t_end_ns has_scheduler_stats scheduler_stats_logged "
    "has_iteration_stats level kvhook_ns "
    "num_kv_blocks num_kv_blocks_used num_finished_reqs ttft_count ttft_sum ttft_min ttft_max "
    "itl_count itl_sum itl_min itl_max",
    "request": "request step t_end_ns",
}


def expected_adapters(release: str) -> list[str]:
    return next(names.split() for first, last, names in SERVED_BY if between(release, first, last))


def expected_columns(release: str, adapter: Adapter, kind: str) -> set[str]:
    table = {"step": STEP_COLUMNS, "request": REQUEST_COLUMNS}[kind][adapter.family]
    changes = [names.split() for first, names in table.items() if between(release, first)]
    return {*OWN[kind].split(), *(name for names in changes for name in names)}


ENGINES = [(release, name) for release in ALL for name in expected_adapters(release)]


# Helpers


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The warnings that kvhook has given so far, without that about old releases' engine cores (`test_core.py`)."""

    def given() -> list[str]:
        warnings = [r.getMessage() for r in caplog.records if r.name == "kvhook" and r.levelno >= logging.WARNING]
        return [text for text in warnings if "engine cores are recorded from vLLM 0.8.3 on" not in text]

    return given


@functools.cache
def engines_of(release: str, *, use_v1: bool = False) -> dict[str, types.ModuleType]:
    """The stand-ins of a release with engines that work. They are made once: each test leaves them as they were."""
    return stub_modules(load(release), use_v1=use_v1)


def stub_modules(facts: ReleaseFacts, *, use_v1: bool = False) -> dict[str, types.ModuleType]:
    modules = build_stub_modules(facts, use_v1=use_v1)
    animate(facts, modules)
    return modules


def everything(modules: dict[str, types.ModuleType]) -> dict[tuple[str, str], Any]:
    """Each object behind a name of a module or of a class in it."""
    found: dict[tuple[str, str], Any] = {}
    for module in modules.values():
        for name, value in vars(module).items():
            found[module.__name__, name] = value
            if isinstance(value, type) and value.__module__ == module.__name__:
                found |= {(f"{module.__name__}:{name}", n): v for n, v in vars(value).items()}
    return found


def same(one: dict[tuple[str, str], Any], other: dict[tuple[str, str], Any]) -> bool:
    return one.keys() == other.keys() and all(one[name] is other[name] for name in one)


def recorder_of(name: str, directory: Path, **more: Any) -> Recorder:
    """A recorder as a session makes one for an engine of the stand-in, everything switched on that can be."""
    hooked = {t.role for t in resolve(BY_NAME[name])[0]}
    engine = types.SimpleNamespace(vllm_config=config_of(kv_cache_metrics=True))
    facts = engine_facts(BY_NAME[name], engine) | {"finished_hook": "finished" in hooked} | more
    ticks = iter(range(10**6))
    return Recorder(0, BY_NAME[name], facts, directory, 64, lambda: next(ticks))


def live(recorder: Recorder, kind: str) -> set[str]:
    columns = {c.name for c in recorder.compiled.layout.columns[kind]}
    return columns - recorder.compiled.absent[kind].keys()


# Every release


def test_the_newest_release_is_the_newest_that_is_known():
    assert ALL[-1] == NEWEST


@pytest.mark.parametrize("release", ALL)
def test_each_engine_of_a_release_is_patched_by_its_adapter_and_put_back(release: str, said: Any):
    modules = engines_of(release)
    with stubs(modules):
        before = everything(modules)
        kvhook.install(ring_slots=64)
        assert list(hooks.patched()) == [n for n in BY_NAME if n in expected_adapters(release)]
        assert not same(everything(modules), before)
        kvhook.uninstall()
        assert same(everything(modules), before)
    # V1 began to be made in 0.6.4 and was not finished before 0.8.0
    assert [f"vLLM {release} is not one" in text for text in said()] == [True] * between(release, "0.6.4", "0.7.3")


@pytest.mark.parametrize("release", since("0.8.0", "0.10.2"))
def test_where_the_old_name_is_v1s_engine_it_is_patched_once(release: str, said: Any):
    modules = engines_of(release, use_v1=True)
    with stubs(modules):
        before = everything(modules)
        kvhook.install(ring_slots=64)
        assert set(hooks.patched()) == set(expected_adapters(release)) - {"v0"}
        assert modules[V0_ENGINE].LLMEngine is modules[ENGINE].LLMEngine
        kvhook.uninstall()
        assert same(everything(modules), before)
    assert said() == []


@pytest.mark.parametrize(("release", "name"), ENGINES)
def test_exactly_the_expected_columns_are_live(release: str, name: str, tmp_path: Path):
    with stubs(engines_of(release)):
        recorder = recorder_of(name, tmp_path)
        for kind, fields in (("step", STEP_FIELDS), ("request", REQUEST_FIELDS)):
            assert live(recorder, kind) == expected_columns(release, BY_NAME[name], kind)
            absent = recorder.compiled.absent[kind]
            assert absent.keys() | live(recorder, kind) == {f.name for f in fields}
            assert all(len(why) > 10 for why in absent.values())


# Numbers


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


# Engines at work, through the hooks


def recorded(session: Any) -> tuple[list[int], list[int]]:
    steps = session.steps()
    return steps["num_generation_tokens"].tolist(), steps["num_running_reqs"].tolist()


@pytest.mark.parametrize("log_stats", [False, True])
@pytest.mark.parametrize(("release", "name"), [e for e in ENGINES if "async" not in e[1]])
def test_each_step_of_an_engine_is_one_record(release: str, name: str, log_stats: bool):
    with stubs(engines_of(release)), kvhook.install(ring_slots=64) as session:
        engine = make_engine(BY_NAME[name].engine, log_stats=log_stats)
        for tokens in (4, 5, 0, 6):
            if name == "v0":
                engine.plan.append([v0_stats(num_generation_tokens_iter=tokens)] if tokens else [])
            else:
                sched, iteration = v1_stats()
                iteration.num_generation_tokens = tokens
                # of 0.9 and 0.10 the engine insists on the scheduler's stats
                engine.plan.append((sched, iteration) if tokens or name == "v1-0.9" else (None, None))
            assert engine.step() == ["output"]
        assert session.faults == {}
        tokens_of, running = recorded(session)
        assert tokens_of == [4, 5, 0, 6]
        assert running == [3, 3, 3 if name == "v1-0.9" else -1, 3]
        assert (session.steps()["t_start_ns"] < session.steps()["t_end_ns"]).all()
        assert session.meta["engines"][0]["stats_on"] is log_stats
        # the user's own loggers are there if they were to be, and see what they would see without kvhook
        seen = [len(logger.seen) for logger in VllmLogger.made]
        assert seen == ([4 if name == "v1-0.9" else 3] if log_stats and name != "v1-0.8" else [])
        kvhook.uninstall()
        engine.plan.append([v0_stats()] if name == "v0" else v1_stats())
        assert engine.step() == ["output"]
        assert len(session.steps()) == 4


@pytest.mark.parametrize("release", since("0.8.0", "0.8.5.post1"))
def test_the_engine_of_0_8_needs_no_module_that_it_does_not_import(release: str):
    """Up to 0.8.4 nothing behind LLM imports V1's loggers."""
    without = {n: m for n, m in engines_of(release).items() if n not in (LOGGERS, ASYNC)}
    with stubs(without), kvhook.install(ring_slots=64) as session:
        engine = make_engine(f"{ENGINE}:LLMEngine", log_stats=False)
        engine.plan.append(v1_stats())
        engine.step()
        assert recorded(session) == ([4], [3])


def test_v0_stats_that_are_not_of_a_step_are_not_recorded():
    with stubs(engines_of("0.9.2")), kvhook.install(ring_slots=64) as session:
        engine = make_engine(BY_NAME["v0"].engine, log_stats=True)
        engine.plan.append([v0_stats()])
        engine.made = [v0_stats(num_running_sys=100)]
        engine.do_log_stats()
        engine.step()
        assert recorded(session) == ([4], [3])


def test_v0_on_an_event_loop_has_a_record_for_each_stats_and_no_step_to_be_timed():
    with stubs(engines_of("0.9.2")), kvhook.install(ring_slots=64) as session:
        module: Any = sys.modules[V0_ENGINE]

        class AsyncEngine(module.LLMEngine):  # type: ignore[misc]
            """As vLLM's own `_AsyncLLMEngine`: it inherits everything but the step."""

            async def step_async(self, virtual_engine: int) -> None:
                self.do_log_stats(object(), None)

        engine = AsyncEngine(config_of(), object, log_stats=False)
        for running in (1, 2):
            engine.made = [v0_stats(num_running_sys=running)]
            asyncio.run(engine.step_async(0))
        assert session.faults == {}
        assert recorded(session) == ([4, 4], [1, 2])
        assert (session.steps()["t_start_ns"] == session.steps()["t_end_ns"]).all()
        assert session.summary().step_time.count == 0


def test_v0_stats_are_made_once_and_given_to_every_logger():
    with stubs(engines_of("0.8.5")), kvhook.install():
        engine = make_engine(BY_NAME["v0"].engine, log_stats=True)
        stats = [v0_stats(), v0_stats()]
        engine.plan += [[s] for s in stats]
        engine.step(), engine.step()
        (logger,) = VllmLogger.made
        assert [id(s) for s in logger.seen] == [id(s) for s in stats]


@pytest.mark.parametrize("log_stats", [False, True])
@pytest.mark.parametrize(("release", "name"), [e for e in ENGINES if "async" in e[1]])
def test_each_record_of_an_engine_on_an_event_loop_is_one_record_of_its_rank(release: str, name: str, log_stats: bool):
    ranks = 1 if between(release, "0.8.0", "0.8.2") else 2
    with stubs(engines_of(release)), kvhook.install(ring_slots=64) as session:
        engine = make_engine(BY_NAME[name].engine, log_stats=log_stats, data_parallel_size=ranks)
        for rank, tokens in ((0, 4), (ranks - 1, 5), (0, 6)):
            sched, iteration = v1_stats()
            iteration.num_generation_tokens = tokens
            engine.arrive(rank, sched, iteration)
        assert session.faults == {}
        steps = session.steps()
        by_rank = {r: steps[steps["engine_index"] == r]["num_generation_tokens"].tolist() for r in range(ranks)}
        assert by_rank == ({0: [4, 6], 1: [5]} if ranks == 2 else {0: [4, 5, 6]})
        assert len(session.meta["engines"]) == ranks
        assert (steps["t_start_ns"] == steps["t_end_ns"]).all()
        assert session.summary().step_time.count == 0
        assert sum(len(logger.seen) for logger in VllmLogger.made) == (3 if log_stats else 0)
        kvhook.uninstall()
        engine.arrive(0, *v1_stats())
        assert len(session.steps()) == 3


@pytest.mark.parametrize("release", since("0.10.2"))
def test_with_stats_off_and_loggers_of_the_users_own_vllm_gets_those_alone(release: str):
    with stubs(engines_of(release)), kvhook.install(ring_slots=64) as session:
        mine = VllmLogger()
        engine = make_engine(f"{ASYNC}:AsyncLLM", log_stats=False, stat_loggers=[lambda *_: mine])
        engine.arrive(0, *v1_stats())
        assert [logger for logger in VllmLogger.made if logger is not mine] == []
        assert len(mine.seen) == len(session.steps()) == 1


@pytest.mark.parametrize("release", since("0.8.5"))
def test_stat_logger_records_without_a_patch(release: str):
    modules = engines_of(release)
    with stubs(modules):
        before = everything(modules)
        kvhook.__dict__.pop("StatLogger", None)
        from kvhook import stat_logger

        vars(stat_logger).pop("StatLogger", None)
        cls = kvhook.StatLogger
        assert issubclass(cls, modules[LOGGERS].StatLoggerBase)
        assert same(everything(modules), before)
        engine = make_engine(f"{ASYNC}:AsyncLLM", log_stats=True, stat_loggers=[cls], data_parallel_size=2)
        for rank in (0, 1, 1):
            engine.arrive(rank, *v1_stats())
        session = cls.session()
        assert same(everything(modules), before)
        assert session.faults == {}
        assert session.steps()["engine_index"].tolist() == [0, 1, 1]
        assert recorded(session) == ([4, 4, 4], [3, 3, 3])
        assert cls(None).log() is None
        # and with the engine hooked as well, nothing is recorded twice
        assert kvhook.install() is session
        both = make_engine(f"{ASYNC}:AsyncLLM", log_stats=True, stat_loggers=[cls])
        both.arrive(0, *v1_stats())
        assert len(session.steps()) == 4
    vars(stat_logger).pop("StatLogger", None)
    kvhook.__dict__.pop("StatLogger", None)


@pytest.mark.parametrize(("release", "name"), [e for e in ENGINES if e[1] != "v1-0.8"])
def test_attach_to_an_engine_that_was_built_before(release: str, name: str):
    with stubs(engines_of(release)):
        engine = make_engine(BY_NAME[name].engine, log_stats=True)
        session = kvhook.attach(engine)
        if BY_NAME[name].timed:
            engine.plan.append([v0_stats()] if name == "v0" else v1_stats())
            engine.step()
        else:
            engine.arrive(0, *v1_stats())
        assert recorded(session) == ([4], [3])


def test_attach_to_an_engine_of_0_8_says_why_it_cannot_be():
    with stubs(engines_of("0.8.5")):
        engine = make_engine(f"{ENGINE}:LLMEngine", log_stats=True)
        with pytest.raises(StatsOffError, match=r"0\.8\.5.*kvhook\.install\(\) before"):
            kvhook.attach(engine)


# A vLLM that is not as it was


def rename(module: str, cls: str, old: str, new: str) -> Callable[[dict[str, Any]], None]:
    """A field, an attribute or a method gets another name."""

    def change(raw: dict[str, Any]) -> None:
        facts = raw["modules"][module]["classes"][cls]
        for field in [*facts.get("fields", ()), *facts.get("attributes", ())]:
            if field["name"] == old:
                field["name"] = new
        for table in ("methods", "properties"):
            if old in facts.get(table, {}):
                facts[table][new] = facts[table].pop(old)

    return change


def resign(module: str, cls: str, method: str, old: str, new: str) -> Callable[[dict[str, Any]], None]:
    """A method takes other arguments."""

    def change(raw: dict[str, Any]) -> None:
        facts = raw["modules"][module]["classes"][cls]["methods"][method]
        assert old in facts["signature"]
        facts["signature"] = facts["signature"].replace(old, new)

    return change


def drop(module: str, table: str, name: str) -> Callable[[dict[str, Any]], None]:
    """A class or an import is gone."""

    def change(raw: dict[str, Any]) -> None:
        del raw["modules"][module][table][name]

    return change


GONE = (
    ("0.32.0", "v1", rename(STATS, "SchedulerStats", "kv_cache_usage", "fill"), "kv_cache_usage num_kv_blocks_used"),
    ("0.32.0", "v1", rename(STATS, "SchedulerStats", "num_waiting_reqs", "queue"), "num_waiting_reqs"),
    ("0.32.0", "v1", rename(STATS, "SchedulerStats", "num_running_reqs", "batch"), "num_running_reqs"),
    ("0.32.0", "v1", rename(STATS, "IterationStats", "num_generation_tokens", "out"), "num_generation_tokens"),
    (
        "0.32.0",
        "v1",
        rename(STATS, "IterationStats", "inter_token_latencies_iter", "itl"),
        "itl_count itl_sum itl_min itl_max",
    ),
    (
        "0.32.0",
        "v1-async",
        rename(STATS, "SchedulerStats", "prefix_cache_stats", "prefix"),
        "prefix_cache_requests prefix_cache_queries prefix_cache_hits prefix_cache_reset "
        "prefix_cache_preempted_requests prefix_cache_preempted_queries prefix_cache_preempted_hits",
    ),
    (
        "0.32.0",
        "v1",
        resign(LOGGERS, "StatLoggerManager", "record", "mm_cache_stats", "cache_stats"),
        "mm_cache_queries mm_cache_hits",
    ),
    ("0.9.2", "v1-0.9", rename(STATS, "SchedulerStats", "kv_cache_usage", "fill"), "kv_cache_usage num_kv_blocks_used"),
    ("0.7.3", "v0", rename(V0_STATS, "Stats", "num_swapped_sys", "swapped"), "num_swapped_reqs"),
    (
        "0.7.3",
        "v0",
        rename(V0_STATS, "Stats", "gpu_cache_usage_sys", "cache_usage_sys"),
        "kv_cache_usage num_kv_blocks_used",
    ),
)


@pytest.mark.parametrize(("release", "name", "change", "columns"), GONE)
def test_a_field_that_is_gone_is_absent_with_a_reason_and_the_rest_is_as_before(
    release: str, name: str, change: Any, columns: str, tmp_path: Path, said: Any
):
    facts = mutated(load(release), change)
    with stubs(stub_modules(facts)):
        kvhook.install(ring_slots=64)
        assert name in hooks.patched()
        recorder = recorder_of(name, tmp_path)
        assert live(recorder, "step") == expected_columns(release, BY_NAME[name], "step") - set(columns.split())
        assert all(recorder.compiled.absent["step"][c] for c in columns.split())
        recorder.functions.record(*((v0_stats(),) if name == "v0" else v1_stats()))
        recorder.functions.publish(1, 2)
        (step,) = kvhook.open(recorder.ring.path).steps()
    assert not set(columns.split()) & set(step.dtype.names)
    left_of_waiting = {"num_waiting_reqs": 7} if "num_skipped_waiting_reqs" in step.dtype.names else {}
    unit = {"prefix_cache_queries": 40, "prefix_cache_hits": 16}
    expect(step, STEP | unit | left_of_waiting)


GONE_OF_REQUESTS = (
    ("0.32.0", "v1", rename(STATS, "FinishedRequestStats", "queued_time", "waited"), "queued_time"),
    ("0.32.0", "v1", rename(STATS, "IterationStats", "update_from_finished_request", "x"), "time_to_first_token"),
    ("0.32.0", "v1", rename(STATS, "RequestStateStats", "first_token_latency", "x"), "time_to_first_token"),
    (
        "0.7.3",
        "v0",
        rename(V0_STATS, "Stats", "time_queue_requests", "waited_requests"),
        "queued_time time_to_first_token",
    ),
)


@pytest.mark.parametrize(("release", "name", "change", "columns"), GONE_OF_REQUESTS)
def test_a_field_of_requests_that_is_gone_is_absent_with_a_reason(
    release: str, name: str, change: Any, columns: str, tmp_path: Path
):
    with stubs(stub_modules(mutated(load(release), change))):
        recorder = recorder_of(name, tmp_path)
        expected = expected_columns(release, BY_NAME[name], "request") - set(columns.split())
        assert live(recorder, "request") == expected
        assert all(recorder.compiled.absent["request"][c] for c in columns.split())


REFUSED = (
    ("0.32.0", "v1", rename(ENGINE, "LLMEngine", "step", "advance"), "LLMEngine.step"),
    ("0.32.0", "v1", resign(ENGINE, "LLMEngine", "__init__", "log_stats", "with_stats"), "takes no log_stats"),
    ("0.32.0", "v1", rename(LOGGERS, "StatLoggerManager", "record", "note"), "StatLoggerManager.record"),
    (
        "0.32.0",
        "v1",
        resign(LOGGERS, "StatLoggerManager", "record", "scheduler_stats", "stats"),
        "takes no scheduler_stats",
    ),
    ("0.32.0", "v1", drop(ENGINE, "imports", "StatLoggerManager"), "has no StatLoggerManager"),
    ("0.32.0", "v1", drop(STATS, "classes", "SchedulerStats"), "has no SchedulerStats"),
    ("0.32.0", "v1", resign(ASYNC, "AsyncLLM", "__init__", "log_stats", "with_stats"), "takes no log_stats"),
    ("0.10.2", "v1", resign(LOGGERS, "PrometheusStatLogger", "record", "iteration_stats", "x"), "no iteration_stats"),
    ("0.10.2", "v1", drop(ENGINE, "imports", "PrometheusStatLogger"), "PrometheusStatLogger"),
    ("0.8.5", "v1", rename(CLIENT, "EngineCoreClient", "make_client", "make"), "make_client"),
    ("0.8.5", "v1", rename(STATS, "IterationStats", "num_preempted_reqs", "preempted"), "num_preempted_reqs"),
    ("0.9.2", "v0", rename(V0_ENGINE, "LLMEngine", "_get_stats", "_stats"), "LLMEngine._get_stats"),
    ("0.9.2", "v0", resign(V0_ENGINE, "LLMEngine", "__init__", "stat_loggers", "loggers"), "takes no stat_loggers"),
    ("0.6.0", "v0", rename(V0_ENGINE, "LLMEngine", "step", "advance"), "LLMEngine.step"),
)


@pytest.mark.parametrize(("release", "family", "change", "why"), REFUSED)
def test_without_what_it_needs_a_family_of_engines_is_not_touched_and_one_message_says_why(
    release: str, family: str, change: Any, why: str, said: Any
):
    modules = build_stub_modules(mutated(load(release), change))
    other = [n for n in expected_adapters(release) if BY_NAME[n].family != family]
    with stubs(modules):
        before = everything(modules)
        kvhook.install(ring_slots=64)
        assert list(hooks.patched()) == [n for n in BY_NAME if n in other]
        mine = {a.trigger for a in ADAPTERS if a.family == family} | ({LOGGERS, STATS} if family == "v1" else set())
        assert same(part(everything(modules), mine), part(before, mine))
        (message,) = said()
        assert "nothing is patched in vLLM's front end" in message
        assert ("Engine cores are recorded separately" in message) == (family == "v1")
        assert why in message
        assert release in message


def part(names: dict[tuple[str, str], Any], modules: set[str]) -> dict[tuple[str, str], Any]:
    """The names of these modules, and of the classes that are made in them."""
    return {name: value for name, value in names.items() if name[0].partition(":")[0] in modules}


def test_a_release_that_nobody_has_seen_is_served_by_the_nearest_and_one_message_says_so(said: Any):
    def newer(raw: dict[str, Any]) -> None:
        raw["release"] = "0.40.0"

    with stubs(stub_modules(mutated(load(ALL[-1]), newer))), kvhook.install(ring_slots=64) as session:
        assert set(hooks.patched()) == {"v1", "v1-async"}
        engine = make_engine(f"{ENGINE}:LLMEngine", log_stats=False)
        engine.plan.append(v1_stats())
        engine.step()
        assert recorded(session) == ([4], [3])
    (message,) = said()
    assert "0.40.0 is newer than this kvhook knows" in message


def test_an_old_adapter_is_not_taken_for_a_new_vllm(said: Any):
    """Had 0.40 what 0.8 had, and not what came later, its prefix cache would still not count blocks."""

    def newer(raw: dict[str, Any]) -> None:
        raw["release"] = "0.40.0"

    with stubs(stub_modules(mutated(load("0.8.5"), newer))):
        kvhook.install(ring_slots=64)
        assert not set(hooks.patched()) & {"v1-0.8", "v1-async-0.8"}
    assert all("nothing is patched" in message for message in said())


@pytest.fixture(autouse=True)
def _forget_loggers() -> Iterator[None]:
    VllmLogger.made.clear()
    yield
    VllmLogger.made.clear()
