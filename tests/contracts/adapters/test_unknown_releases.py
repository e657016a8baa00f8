"""A vLLM that is not as it was: what is gone is absent with a reason, and what cannot be served is not touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import kvhook
from kvhook import hooks
from kvhook.adapters import ADAPTERS
from tests.contracts.adapters.engines import recorded, recorder_of, stub_modules
from tests.contracts.adapters.expected import BY_NAME, expected_adapters, expected_columns
from tests.contracts.behaviour import ASYNC, CLIENT, ENGINE, LOGGERS, V0_ENGINE, make_engine
from tests.contracts.changes import drop, rename, resign
from tests.contracts.core import STATS
from tests.contracts.loader import build_stub_modules, load, mutated, stubs
from tests.contracts.made_stats import STEP, V0_STATS, expect, v0_stats, v1_stats
from tests.contracts.patching import everything, same
from tests.contracts.recorders import live
from tests.contracts.releases import ALL

pytestmark = pytest.mark.usefixtures("fresh")


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
