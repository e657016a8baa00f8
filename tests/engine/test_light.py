"""Level light on a real engine: against vLLM's own counters, its objects, and what came back."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import pytest

import kvhook
from tests.engine import vllm_here
from tests.engine.conftest import MakeLLM, Recorded, record
from tests.workloads import BLOCK_SIZE, USABLE, Seen, run, workload

pytestmark = pytest.mark.usefixtures("nothing_installed")

SENT = [prompt for call in workload() for prompt in call.prompts]

#: What level light has not got: written down here, not taken from kvhook.
ONLY_FULL = {"scheduler_stats_logged", "num_corrupted_reqs", "mm_cache_queries", "mm_cache_hits", "vllm_stats_ns"} | {
    f"{series}_{what}" for series in ("ttft", "itl") for what in ("count", "sum", "min", "max")
}
COUNTERS = {
    "num_prompt_tokens": "vllm:prompt_tokens",
    "num_prompt_tokens_cached": "vllm:prompt_tokens_cached",
    "num_generation_tokens": "vllm:generation_tokens",
    "prefix_cache_queries": "vllm:prefix_cache_queries",
    "prefix_cache_hits": "vllm:prefix_cache_hits",
    "num_preempted_reqs": "vllm:num_preemptions",
    "num_finished_reqs": "vllm:request_success",
}


@pytest.fixture(scope="module")
def light_on(make_llm: MakeLLM) -> Recorded:
    """The workload at level light; the user has vLLM's stats on."""
    return record(make_llm, {"level": "light"}, disable_log_stats=False)


@pytest.fixture(scope="module")
def light_off(make_llm: MakeLLM) -> Recorded:
    """The workload at level light; the user has left vLLM's stats off."""
    return record(make_llm, {"level": "light"})


@pytest.fixture(params=["light_on", "light_off"])
def light(request: pytest.FixtureRequest) -> Recorded:
    """Both."""
    both: Recorded = request.getfixturevalue(request.param)
    return both


# Sums


@pytest.mark.parametrize("column", COUNTERS)
def test_sum_over_the_steps_is_vllms_counter_of_a_run_without_kvhook(light: Recorded, bare: Seen, column: str):
    if light.lacks(column):
        return
    assert light.total(column) == bare.counters.get(COUNTERS[column], 0)


@pytest.mark.parametrize("column", COUNTERS)
def test_with_the_users_stats_on_it_is_the_counter_of_the_same_run(light_on: Recorded, column: str):
    if light_on.lacks(column):
        return
    assert light_on.total(column) == light_on.seen.counters.get(COUNTERS[column], 0)


def test_tokens_and_finished_requests_are_those_that_came_back(light: Recorded):
    assert light.total("num_generation_tokens") == sum(len(ids) for ids in light.seen.token_ids)
    assert light.total("num_prompt_tokens") == sum(map(len, SENT)) == sum(light.seen.prompt_lengths)
    assert light.total("num_finished_reqs") == len(light.seen.outputs) == len(SENT)
    assert light.summary.num_generation_tokens == light.total("num_generation_tokens")
    assert light.summary.num_finished_reqs == len(SENT)
    assert len(light.requests) == 0


def test_tokens_of_each_step_are_those_the_scheduler_gave_out_in_it(light: Recorded):
    assert light.steps["num_generation_tokens"].tolist() == [step.tokens for step in light.seen.steps]


def test_computed_and_cached_prompt_tokens_make_up_all(light: Recorded):
    if light.lacks("num_prompt_tokens_computed", "num_prompt_tokens_cached"):
        return
    s = light.steps
    assert (s["num_prompt_tokens_computed"] + s["num_prompt_tokens_cached"] == s["num_prompt_tokens"]).all()
    assert light.total("num_prompt_tokens_external") == 0
    # what a request was given from the cache stands on its output, if vLLM counts re-admitted ones apart
    cached = [one.num_cached_tokens for one in light.seen.outputs]
    assert light.total("num_prompt_tokens_cached") == sum(cached)


def test_each_step_says_what_level_full_says_of_it(light: Recorded, stats_on: Recorded):
    """The same work on two engines: what is counted by kvhook is what vLLM counts in its IterationStats."""
    here = set(COUNTERS) | {"num_running_reqs", "num_waiting_reqs", "num_prompt_tokens_computed"}
    with_stats = stats_on.steps["has_scheduler_stats"] == 1
    for column in sorted(here - vllm_here.absent("step")):
        assert light.steps[column][with_stats].tolist() == stats_on.steps[column][with_stats].tolist(), column


def test_lookups_are_those_that_vllm_made(light: Recorded):
    new = np.array([lookup[:2] for lookup in light.seen.lookups if not lookup[2]])
    again = np.array([lookup[:2] for lookup in light.seen.lookups if lookup[2]])
    s = light.summary
    if light.lacks("prefix_cache_preempted_requests"):
        new = np.concatenate([new, again])
    else:
        assert light.total("prefix_cache_preempted_requests") == len(again)
        assert [s.prefix_cache_preempted_queries, s.prefix_cache_preempted_hits] == again.sum(axis=0).tolist()
    assert light.total("prefix_cache_requests") == len(new)
    assert [s.prefix_cache_queries, s.prefix_cache_hits] == new.sum(axis=0).tolist()
    assert s.prefix_cache_hit_rate == new[:, 1].sum() / new[:, 0].sum()


# Steps


def test_one_record_per_call_of_step_within_its_call(light: Recorded, bare: Seen):
    assert light.steps["step"].tolist() == list(range(len(light.seen.steps)))
    assert len(light.seen.steps) == len(bare.steps)
    assert light.summary.records_lost == light.summary.records_dropped == 0
    assert light.summary.steps_by_level == {"light": len(bare.steps)}
    outside = np.array([(step.start_ns, step.end_ns) for step in light.seen.steps])
    start, end = light.steps["t_start_ns"], light.steps["t_end_ns"]
    assert (outside[:, 0] <= start).all()
    assert (start < end).all()
    assert (end <= outside[:, 1]).all()


def test_usage_is_blocks_in_use_over_blocks_that_can_be_used(light: Recorded):
    held = np.array([step.blocks_in_use for step in light.seen.steps])
    with_stats = light.steps["has_scheduler_stats"] == 1
    assert with_stats.sum() > 0.9 * len(held)
    assert (light.steps["num_kv_blocks"] == USABLE).all()
    assert light.steps["num_kv_blocks_used"][with_stats].tolist() == held[with_stats].tolist()
    usage = vllm_here.usage(held[with_stats], USABLE)
    assert light.steps["kv_cache_usage"][with_stats] == pytest.approx(usage, abs=1e-12)
    assert light.summary.kv_cache_usage_peak == pytest.approx(max(usage))
    assert (light.summary.num_kv_blocks, light.summary.block_size) == (USABLE, BLOCK_SIZE)


def test_exactly_what_light_has_not_is_absent_with_a_reason(light: Recorded):
    (engine,) = light.session.meta["engines"]
    assert engine["absent"]["step"].keys() == vllm_here.absent("step") | ONLY_FULL
    assert not set(light.steps.dtype.names) & engine["absent"]["step"].keys()
    assert len(light.requests.dtype.names) == 1  # the number of the engine
    assert all(engine["absent"]["step"].values())


# Nothing that the user can see changes


def test_outputs_are_the_same_with_and_without(light: Recorded, bare: Seen, bare_default: Seen):
    assert light.seen.token_ids == bare.token_ids == bare_default.token_ids
    assert [s.blocks_in_use for s in light.seen.steps] == [s.blocks_in_use for s in bare.steps]
    assert light.session.faults == {}


def test_stats_off_the_outputs_carry_no_metrics_as_without_kvhook(light_off: Recorded, bare_default: Seen):
    assert {one.metrics for one in bare_default.outputs} == {None}
    assert {one.metrics for one in light_off.seen.outputs} == {None}


def test_stats_off_vllm_makes_no_loggers_no_lines_and_no_metrics(light_off: Recorded, bare_default: Seen):
    assert light_off.seen.loggers == bare_default.loggers == []
    assert not any("Avg prompt throughput" in line for line in light_off.seen.log)
    assert light_off.seen.error_of_get_metrics == bare_default.error_of_get_metrics
    assert light_off.seen.error_of_get_metrics.startswith("AssertionError: Stat logging disabled")


def test_stats_on_vllm_counts_and_logs_as_without_kvhook(light_on: Recorded, bare: Seen):
    assert light_on.seen.loggers == bare.loggers
    assert light_on.seen.counters == bare.counters
    counts = {name: count for name, (count, _) in bare.histograms.items()}
    assert {name: count for name, (count, _) in light_on.seen.histograms.items()} == counts
    assert light_on.seen.finished_by_reason == bare.finished_by_reason
    logged = [any("Avg prompt throughput" in line for line in seen.log) for seen in (light_on.seen, bare)]
    assert logged[0] == logged[1]
    metrics = [[one.metrics is None for one in seen.outputs] for seen in (light_on.seen, bare)]
    assert metrics[0] == metrics[1]


# What ends otherwise: stop strings, several outputs of a prompt, requests that are aborted


class Odd(NamedTuple):
    """Totals of kvhook, and by how much vLLM's counters rose."""

    totals: dict[str, int]
    counters: dict[str, int]
    returned: list[Any]


@pytest.fixture(scope="module")
def odd(make_llm: MakeLLM) -> dict[str, Odd]:
    """Ways of ending -> what was counted of it. vLLM's stats are on, so that it counts as well."""
    from vllm import SamplingParams  # type: ignore[import-not-found, unused-ignore]

    got: dict[str, Odd] = {}
    kvhook.uninstall()
    with kvhook.install(level="light") as session:
        llm = make_llm(disable_log_stats=False)
        prompts = [{"prompt_token_ids": prompt} for prompt in workload()[1].prompts[:3]]

        def counters() -> Counter[str]:
            found: Counter[str] = Counter()
            for metric in llm.get_metrics():
                if type(metric).__name__ == "Counter":
                    found[metric.name] += metric.value
            return found

        def take(name: str, act: Any) -> list[Any]:
            steps, before = len(session.steps()), counters()
            returned: list[Any] = act()
            new, after = session.steps()[steps:], counters()
            after.subtract(before)
            columns = [c for c in COUNTERS if c in (new.dtype.names or ())]
            got[name] = Odd({c: int(new[c].sum()) for c in columns}, dict(after), returned)
            return returned

        def generate(**sampling: Any) -> Any:
            params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=24, **sampling)
            return lambda: llm.generate(prompts, params, use_tqdm=False)

        (text, *_) = [one.outputs[0].text for one in take("plain", generate())]
        stop = text[len(text) // 2 :][:3]
        take("stop string", generate(stop=[stop]))
        several = SamplingParams(n=3, temperature=1.0, seed=5, ignore_eos=True, max_tokens=7)
        take("several", lambda: llm.generate(prompts, several, use_tqdm=False))

        def abort() -> list[Any]:
            engine = llm.llm_engine
            for name in ("a", "b"):
                engine.add_request(name, {"prompt_token_ids": [5, 6, 7]}, SamplingParams(max_tokens=30))
            for _ in range(4):
                engine.step()
            engine.abort_request(["a"])
            done = []
            while engine.has_unfinished_requests():
                done += [one for one in engine.step() if one.finished]
            return done

        take("aborted", abort)
        assert session.faults == {}
    return got


@pytest.mark.parametrize("way", ["plain", "stop string", "several", "aborted"])
def test_however_requests_end_it_is_counted_as_vllm_counts_it(odd: dict[str, Odd], way: str):
    one = odd[way]
    here = COUNTERS.keys() - vllm_here.absent("step") - {"num_finished_reqs"}
    assert here == one.totals.keys() - {"num_finished_reqs"}
    for column in here:
        assert one.totals[column] == one.counters.get(COUNTERS[column], 0), column


def test_a_stop_string_ends_requests_early_and_they_are_counted(odd: dict[str, Odd]):
    one = odd["stop string"]
    reasons = Counter(output.outputs[0].finish_reason for output in one.returned)
    assert reasons["stop"] >= 1
    assert one.totals["num_generation_tokens"] < odd["plain"].totals["num_generation_tokens"]
    assert one.totals["num_finished_reqs"] == len(one.returned) == one.counters["vllm:request_success"]


def test_each_output_of_a_prompt_is_a_request_that_finishes(odd: dict[str, Odd]):
    one = odd["several"]
    assert one.totals["num_finished_reqs"] == one.counters["vllm:request_success"] == 9
    assert one.totals["num_generation_tokens"] == sum(
        len(output.token_ids) for request in one.returned for output in request.outputs
    )


def test_an_aborted_request_has_ended_too(odd: dict[str, Odd]):
    one = odd["aborted"]
    assert len(one.returned) == 1
    assert one.totals["num_finished_reqs"] == len(one.returned) + 1


# Attaching


def test_attach_at_level_light_records_from_then_on(make_llm: MakeLLM):
    llm = make_llm(disable_log_stats=False)
    run(llm, workload()[:1])
    session = kvhook.install(level="light")
    assert kvhook.attach(llm) is session
    outputs = run(llm, workload()[1:3])
    steps = session.steps()
    assert (steps["level"] == 1).all()
    assert steps["num_generation_tokens"].sum() == sum(len(one.outputs[0].token_ids) for one in outputs)
    kvhook.uninstall()
    assert run(llm, workload()[1:2])
    assert len(session.steps()) == len(steps)
