"""The facts are there, well-formed, and say what a person read in vLLM's code; the stand-ins follow them."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import inspect
import json
import sys
from typing import Any

import pytest

from tests.contracts.extracting.drift import drift
from tests.contracts.extracting.modules import module_facts
from tests.contracts.extracting.stored import FACTS, FORMAT, load_raw, render, stable
from tests.contracts.extracting.wanted import MODULES, Wanted
from tests.contracts.loader import build_stub_modules, load, mutated, stubs
from tests.contracts.releases import ALL, since

STATS = "vllm.v1.metrics.stats"
LOGGERS = "vllm.v1.metrics.loggers"
ENGINE = "vllm.v1.engine.llm_engine"
V0_ENGINE = "vllm.engine.llm_engine"
V0_STATS = "vllm.engine.metrics_types"


# The files


def test_every_release_since_0_6_0_is_here():
    assert ALL[0] == "0.6.0"
    assert len(ALL) >= 66
    minors = {tuple(map(int, release.split(".")[:2])) for release in ALL}
    assert minors >= {(0, minor) for minor in range(6, 34)}


def test_releases_are_sorted_by_version():
    order = ["0.9.0", "0.9.0.1", "0.9.1", "0.10.0", "0.10.1", "0.10.1.1", "0.10.2", "0.11.0"]
    assert [release for release in ALL if release in order] == order
    assert ALL.index("0.8.5") + 1 == ALL.index("0.8.5.post1")


def test_only_stable_releases_count():
    names = ["0.9.0rc1", "0.9.0", "0.9.0.dev3", "0.9.0.post1", "0.5.5", "0.10.0a1", "1.0.0"]
    assert stable(names) == ["0.9.0", "0.9.0.post1", "1.0.0"]


@pytest.mark.parametrize("release", ALL)
def test_file_is_in_the_form_that_extract_writes(release: str):
    text = (FACTS / f"{release}.json").read_text("utf-8")
    raw = json.loads(text)
    assert render(raw) == text
    assert raw["release"] == release
    assert raw["format"] == FORMAT
    assert set(raw["modules"]) == set(MODULES)
    assert len(text) < 48_000


# What they say, against a reading of the code


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("gpu_cache_usage", "0.7.1", "0.9.1"),
        ("kv_cache_usage", "0.9.2", None),
        ("prefix_cache_stats", "0.7.3", None),
        ("spec_decoding_stats", "0.8.3", None),
        ("num_corrupted_reqs", "0.9.2", "0.11.0"),
        ("step_counter", "0.10.1", None),
        ("kv_connector_stats", "0.11.0", None),
        ("connector_prefix_cache_stats", "0.11.1", None),
        ("waiting_lora_adapters", "0.11.1", None),
        ("kv_cache_eviction_events", "0.12.0", None),
        ("cudagraph_stats", "0.13.0", None),
        ("perf_stats", "0.14.0", None),
        ("encoder_cache_usage", "0.16.0", "0.19.1"),
        ("num_skipped_waiting_reqs", "0.20.0", None),
        ("iteration_details", "0.26.0", None),
        ("ec_connector_stats", "0.31.0", None),
        ("num_kv_fetch_reqs_by_stage", "0.32.0", None),
    ],
)
def test_scheduler_stats(name: str, first: str, last: str | None):
    assert having(STATS, "SchedulerStats", name) == since(first, last)


@pytest.mark.parametrize(
    ("cls", "name", "first", "last"),
    [
        ("IterationStats", "num_preempted_reqs", "0.8.0", None),
        ("IterationStats", "time_per_output_tokens_iter", "0.7.1", "0.10.1.1"),
        ("IterationStats", "inter_token_latencies_iter", "0.10.2", None),
        ("IterationStats", "num_prompt_tokens", "0.7.0", None),
        ("IterationStats", "prompt_token_stats", "0.16.0", None),
        ("IterationStats", "num_corrupted_reqs", "0.11.1", None),
        ("IterationStats", "waiting_lora_adapters", "0.8.0", "0.11.0"),
        ("IterationStats", "num_watermarked_reqs", "0.32.0", None),
        ("PrefixCacheStats", "hits", "0.7.3", None),
        ("PrefixCacheStats", "preempted_hits", "0.11.1", None),
        ("PrefixCacheStats", "hits_by_source", "0.32.0", None),
        ("FinishedRequestStats", "queued_time", "0.8.0", None),
        ("FinishedRequestStats", "mean_time_per_output_token", "0.11.0", None),
        ("FinishedRequestStats", "is_corrupted", "0.11.1", None),
        ("FinishedRequestStats", "num_cached_tokens", "0.13.0", None),
        ("FinishedRequestStats", "request_id", "0.20.0", None),
        ("FinishedRequestStats", "num_preemptions", "0.30.0", None),
        ("PromptTokenStats", "recomputed_tokens", "0.16.0", "0.19.1"),
    ],
)
def test_other_stats(cls: str, name: str, first: str, last: str | None):
    assert having(STATS, cls, name) == since(first, last)


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("gpu_cache_usage_sys", "0.6.0", "0.11.0"),
        ("time_queue_requests", "0.6.4", "0.11.0"),
        ("time_in_queue_requests", "0.6.4", "0.9.0.1"),
        ("time_per_output_tokens_iter", "0.6.0", "0.10.1.1"),
        ("inter_token_latencies_iter", "0.10.2", "0.11.0"),
        ("spec_decode_metrics", "0.6.0", "0.9.2"),
        ("best_of_requests", "0.6.0", "0.6.2"),
    ],
)
def test_v0_stats(name: str, first: str, last: str):
    assert having(V0_STATS, "Stats", name) == since(first, last)


def having(module: str, cls: str, name: str) -> list[str]:
    """The releases where an instance of a class has a name to read."""
    return [release for release in ALL if name in load(release).readable(module, cls)]


@pytest.mark.parametrize(
    ("attribute", "maker", "first", "last"),
    [
        (None, (), "0.7.0", "0.8.5.post1"),
        ("stat_logger", ("PrometheusStatLogger",), "0.9.0", "0.10.2"),
        ("logger_manager", ("StatLoggerManager",), "0.11.0", None),
    ],
)
def test_where_the_v1_engine_keeps_its_loggers(
    attribute: str | None, maker: tuple[str, ...], first: str, last: str | None
):
    for release in since(first, last):
        cls = load(release).find(ENGINE, "LLMEngine")
        assert cls is not None
        assert (cls.calls.stat_logger_attribute, cls.calls.made_by) == (attribute, maker)
        recorded = cls.calls.arguments("step", f"self.{attribute}.record")
        assert (recorded is not None) == (attribute is not None)


def test_the_v1_engine_of_0_8_switches_stats_off():
    for release in since("0.7.3"):
        cls = load(release).find(ENGINE, "LLMEngine")
        assert cls is not None
        silent = release in since("0.7.3", "0.8.5.post1")
        expected = ("EngineCoreClient.make_client", "OutputProcessor") if silent else ()
        assert cls.calls.hard_coded_log_stats_false == expected


def test_the_v1_engine_takes_loggers_of_others_from_0_11_1():
    refusing = []
    for release in since("0.8.0"):
        cls = load(release).find(ENGINE, "LLMEngine")
        assert cls is not None
        if cls.calls.refuses_stat_loggers:
            refusing.append(release)
    assert refusing == since("0.8.5", "0.11.0")


def test_the_v0_engine_hands_stats_to_every_logger():
    for release in since("0.6.0", "0.10.2"):
        cls = load(release).find(V0_ENGINE, "LLMEngine")
        assert cls is not None
        assert cls.module == V0_ENGINE
        assert cls.calls.stat_logger_attribute == "stat_loggers"
        assert cls.calls.arguments("do_log_stats", "logger.log") == ("stats",)
        assert "scheduler_outputs" in cls.methods["_get_stats"].signature.parameters


def test_the_old_name_of_the_engine_is_an_alias_from_0_11():
    for release in since("0.11.0"):
        cls = load(release).find(V0_ENGINE, "LLMEngine")
        assert cls is not None
        assert cls.module == ENGINE


@pytest.mark.parametrize(
    ("names", "first", "last"),
    [
        (["self", "scheduler_stats", "iteration_stats"], "0.8.0", "0.9.2"),
        (["self", "scheduler_stats", "iteration_stats", "engine_idx"], "0.10.0", "0.11.0"),
        (["self", "scheduler_stats", "iteration_stats", "mm_cache_stats", "engine_idx"], "0.11.1", None),
    ],
)
def test_signature_of_record(names: list[str], first: str, last: str | None):
    for release in since(first, last):
        record = load(release).method(LOGGERS, "StatLoggerBase", "record")
        assert record is not None
        assert record.is_abstract
        assert list(record.signature.parameters) == names


def test_llm_switches_stats_off_in_every_release():
    for release in ALL:
        cls = load(release).find("vllm.entrypoints.llm", "LLM")
        assert cls is not None
        assert cls.calls.sets_disable_log_stats


def test_environment():
    assert [release for release in ALL if load(release).enable_envs_cache] == since("0.11.1")
    assert [r for r in ALL if "VLLM_USE_V1" in load(r).env_variables] == since("0.6.4", "0.11.0")


# Drift


def test_drift_names_what_came_and_went():
    changes = drift(load_raw("0.9.1"), load_raw("0.9.2"))
    assert f"- field {STATS}:SchedulerStats.gpu_cache_usage" in changes
    assert f"+ field {STATS}:SchedulerStats.kv_cache_usage: float = 0.0" in changes
    assert drift(load_raw("0.9.0"), load_raw("0.9.0.1")) == []


def test_a_change_of_spelling_is_no_drift():
    old = "@dataclass\nclass S:\n    a: Optional['List[X]'] = None\n    b: Union[int, Dict[str, X]] = 0"
    new = "@dataclass\nclass S:\n    a: list[X] | None = None\n    b: int | dict[str, 'X'] = 0"
    wanted = Wanted(classes="S")
    before, after = (module_facts(text, "vllm.s", False, wanted)["classes"] for text in (old, new))
    assert before == after


# Stand-ins


@pytest.mark.parametrize("release", ALL)
def test_stand_ins_have_the_names_and_signatures_of_the_release(release: str):
    facts = load(release)
    modules = build_stub_modules(facts)
    for module in facts.modules.values():
        for cls in module.classes.values():
            stub = getattr(modules[module.name], cls.name)
            assert stub.__module__ == module.name
            for name, method in cls.methods.items():
                found = inspect.getattr_static(stub, name)
                function = getattr(found, "__func__", found)
                assert inspect.signature(function) == method.signature
                assert inspect.iscoroutinefunction(function) == method.is_async
                assert isinstance(found, classmethod) == method.is_classmethod
                assert isinstance(found, staticmethod) == method.is_staticmethod
            if cls.kind in ("dataclass", "struct"):
                instance = stub()
                for name in facts.readable(module.name, cls.name):
                    getattr(instance, name)


def test_a_stand_in_starts_with_zeros():
    modules = build_stub_modules(load("0.32.0"))
    stats = modules[STATS].SchedulerStats(num_running_reqs=3)
    assert (stats.num_running_reqs, stats.kv_cache_usage, stats.kv_cache_eviction_events) == (3, 0.0, [])
    assert (stats.prefix_cache_stats.hits, stats.prefix_cache_stats.preempted_hits) == (0, 0)
    assert stats.iteration_details is None
    assert dataclasses.is_dataclass(modules[STATS].SchedulerStats)
    assert stats.prefix_cache_stats is not modules[STATS].SchedulerStats().prefix_cache_stats
    iteration = modules[STATS].IterationStats()
    assert (iteration.num_generation_tokens, iteration.inter_token_latencies_iter) == (0, [])
    assert (iteration.prompt_token_stats.total, iteration.num_prompt_tokens) == (0, 0)
    assert modules[STATS].FinishedRequestStats().finish_reason is modules["vllm.v1.engine"].FinishReason.STOP
    outputs = modules["vllm.v1.engine"].EngineCoreOutputs(scheduler_stats=stats)
    assert (outputs.engine_index, outputs.outputs, outputs.scheduler_stats) == (0, [], stats)


def test_methods_of_a_stand_in_do_nothing():
    modules = build_stub_modules(load("0.16.0"))
    manager = modules[LOGGERS].StatLoggerManager(vllm_config=None)
    assert manager.record(scheduler_stats=None, iteration_stats=None, mm_cache_stats=None) is None
    with pytest.raises(TypeError):
        manager.record(scheduler_stats=None, no_such_argument=None)
    engine = modules["vllm.v1.engine.async_llm"].AsyncLLM(None, None, log_stats=True)
    assert asyncio.run(engine.do_log_stats()) is None


def test_both_engines_of_a_release_that_had_two():
    facts = load("0.9.2")
    v0, v1 = (build_stub_modules(facts, use_v1=use_v1) for use_v1 in (False, True))
    assert v0[V0_ENGINE].LLMEngine.__module__ == V0_ENGINE
    assert v1[V0_ENGINE].LLMEngine.__module__ == ENGINE
    assert v0[LOGGERS].StatLoggerBase is not v0["vllm.engine.metrics"].StatLoggerBase
    assert v0["vllm.engine.metrics"].StatLoggerBase is v0[V0_STATS].StatLoggerBase


@pytest.mark.parametrize("lazy", [False, True])
def test_stand_ins_can_be_imported(lazy: bool):
    before = {name for name in sys.modules if name.split(".")[0] == "vllm"}
    modules = build_stub_modules(load("0.6.0"))
    with stubs(modules, lazy=lazy):
        assert (STATS in sys.modules, "vllm" in sys.modules) == (False, not lazy)
        assert importlib.import_module("vllm").__version__ == "0.6.0"
        assert importlib.import_module("vllm.engine.llm_engine") is modules["vllm.engine.llm_engine"]
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(STATS)
    assert {name for name in sys.modules if name.split(".")[0] == "vllm"} == before


def test_facts_can_be_mutated():
    def rename(raw: dict[str, Any]) -> None:
        fields = raw["modules"][STATS]["classes"]["SchedulerStats"]["fields"]
        next(field for field in fields if field["name"] == "kv_cache_usage")["name"] = "cache_filled"

    facts = load("0.32.0")
    changed = mutated(facts, rename)
    assert "kv_cache_usage" in facts.readable(STATS, "SchedulerStats")
    assert "kv_cache_usage" not in changed.readable(STATS, "SchedulerStats")
    stats = build_stub_modules(changed)[STATS].SchedulerStats()
    assert (stats.cache_filled, hasattr(stats, "kv_cache_usage")) == (0.0, False)
