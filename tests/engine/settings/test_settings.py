"""Many settings and workloads, drawn from seeds: what kvhook records against what the core did and what came back.

    KVHOOK_SETTINGS_SEEDS="17 40-43" python -m pytest tests/engine/settings/test_settings.py     these seeds
    KVHOOK_SETTINGS_CASES=300 python -m pytest tests/engine/settings/test_settings.py            the first 300

The truths are three, and none of them is kvhook's: what the scheduler itself made in each step (`core_view`), the
outputs (`drive`), and a model of the prefix cache (`prefix_model`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.engine import vllm_here
from tests.engine.conftest import MakeLLM
from tests.engine.settings import cases, core_view, release
from tests.engine.settings.bench import Bench, Ran, quick_collections
from tests.engine.settings.core_view import Output, Request, Step
from tests.engine.settings.drive import Asked, Sample

PEAKS = ("kv_cache_usage_peak", "num_kv_blocks_peak")


@pytest.fixture(scope="module")
def bench(make_llm: MakeLLM) -> Iterator[Bench]:
    with quick_collections():
        bench = Bench(make_llm)
        yield bench
        bench.close()


@pytest.fixture(scope="module", params=release.run(cases.seeds()), ids=lambda seed: f"seed-{seed}")
def ran(request: pytest.FixtureRequest, bench: Bench) -> Ran:
    return bench.run(request.param)


# The oracles agree with each other, or the tests below would prove nothing.


def test_the_core_gave_out_what_came_back(ran: Ran):
    assert len(everything(ran)) == len(ran.requests), ran.say("requests")
    for _, sample, request in everything(ran):
        if sample.by_string:
            # of the tokens of one step, those behind a stop string are given out and not returned
            ran.same(f"tokens of {request.id}", sample.tokens, request.tokens[: len(sample.tokens)])
        elif sample.reason:
            ran.same(f"tokens of {request.id}", sample.tokens, request.tokens)
            assert request.finished, ran.say(request.id)


def test_cached_tokens_that_came_back_are_those_of_the_core(ran: Ran):
    known = cached(ran)
    for asked, sample, request in everything(ran):
        if asked.n == 1 and sample.reason and sample.cached is not None:
            ran.same(f"cached tokens of {request.id}", sample.cached, known[request.number])


def everything(ran: Ran) -> list[tuple[Asked, Sample, Request]]:
    """What was asked for, what came back and what the core had, for each sample; requests that never came to be sent
    are left out."""
    sent = sorted((asked for asked in ran.asked if asked.id), key=lambda asked: int(asked.id))
    return [
        (asked, asked.samples.get(i, Sample(0, i, [], "", False, None)), request)
        for (asked, i), request in zip([(a, i) for a in sent for i in range(a.n)], ran.requests, strict=True)
    ]


def firsts(ran: Ran) -> list[list[Output]]:
    """Per step the outputs that were their request's first."""
    known: set[int] = set()
    found = []
    for step in ran.core:
        found.append([output for output in step.outputs if output.request not in known])
        known.update(output.request for output in step.outputs)
    return found


def cached(ran: Ran) -> dict[int, int | None]:
    """Prompt tokens that each request had from the cache, by its first output."""
    return {output.request: output.cached for outputs in firsts(ran) for output in outputs}


# Steps


def test_each_call_of_step_has_one_record_and_nothing_failed(ran: Ran):
    numbers = list(range(ran.first_step, ran.first_step + len(ran.core)))
    ran.same("steps", ran.steps["step"].tolist(), numbers)
    ran.same("faults", ran.faults, {})


def test_a_step_is_without_stats_only_where_the_core_made_none(ran: Ran):
    ran.same("has_scheduler_stats", ran.steps["has_scheduler_stats"].tolist(), [int(bool(s.stats)) for s in ran.core])


@pytest.mark.parametrize("column", core_view.STATES)
def test_states_of_each_step_are_those_the_core_told(ran: Ran, column: str):
    if ran.has(column):
        known = [(r, s.state(column)) for r, s in zip(ran.steps[column].tolist(), ran.core, strict=True) if s.stats]
        ran.same(column, [r for r, _ in known], [s for _, s in known])


@pytest.mark.parametrize("column", core_view.COUNTS)
def test_counts_of_each_step_are_those_the_core_made(ran: Ran, column: str):
    if ran.has(column):
        ran.same(column, ran.steps[column].tolist(), [step.count(column) for step in ran.core])


def test_blocks_in_use_are_those_of_the_pool(ran: Ran):
    known = [(r, s.blocks_after) for r, s in zip(ran.steps["num_kv_blocks_used"].tolist(), ran.core, strict=True)]
    known = [pair for pair, step in zip(known, ran.core, strict=True) if step.stats and not stopped_outside(step, ran)]
    ran.same("num_kv_blocks_used", [r for r, _ in known], [s for _, s in known])


def stopped_outside(step: Step, ran: Ran) -> bool:
    """Whether a stop string ended a request in this step: its blocks are given back after the stats were made."""
    named = {request.number for _, sample, request in everything(ran) if sample.by_string}
    return any(output.request in named for output in step.outputs)


def test_peaks_are_the_blocks_in_use_when_the_step_was_scheduled(ran: Ran):
    # strict as soon as kvhook knows of the column
    if not ran.absent["step"].keys() & set(PEAKS) and PEAKS[0] not in ran.steps.dtype.names:
        return
    assert ran.has(*PEAKS), ran.say("the scheduler is in this process, so its peak can be seen")
    known = [(r, s) for r, s in zip(ran.steps, ran.core, strict=True) if s.blocks_scheduled]
    blocks = [max(step.blocks_scheduled) for _, step in known]
    ran.same("num_kv_blocks_peak", [int(row["num_kv_blocks_peak"]) for row, _ in known], blocks)
    usage = [
        pytest.approx(vllm_here.usage(n, int(row["num_kv_blocks"]))) for n, (row, _) in zip(blocks, known, strict=True)
    ]
    ran.same("kv_cache_usage_peak", [float(row["kv_cache_usage_peak"]) for row, _ in known], usage)


# Tokens


def test_tokens_generated_in_each_step_are_those_the_core_gave_out(ran: Ran):
    expected = [sum(len(output.tokens) for output in step.outputs) for step in ran.core]
    ran.same("num_generation_tokens", ran.steps["num_generation_tokens"].tolist(), expected)


def test_prompt_tokens_of_each_step_are_the_prompts_of_first_outputs(ran: Ran):
    expected = [sum(len(ran.requests[o.request].prompt) for o in outputs) for outputs in firsts(ran)]
    ran.same("num_prompt_tokens", ran.steps["num_prompt_tokens"].tolist(), expected)


def test_cached_and_computed_prompt_tokens_of_each_step_are_what_the_core_said(ran: Ran):
    if not ran.has("num_prompt_tokens_cached", "num_prompt_tokens_computed"):
        return
    expected = [sum(output.cached or 0 for output in outputs) for outputs in firsts(ran)]
    ran.same("num_prompt_tokens_cached", ran.steps["num_prompt_tokens_cached"].tolist(), expected)
    together = (ran.steps["num_prompt_tokens_cached"] + ran.steps["num_prompt_tokens_computed"]).tolist()
    ran.same("cached and computed", together, ran.steps["num_prompt_tokens"].tolist())


def test_preemptions_of_each_step_are_those_that_came_with_its_outputs(ran: Ran):
    expected = [sum(output.preemptions for output in step.outputs) for step in ran.core]
    ran.same("num_preempted_reqs", ran.steps["num_preempted_reqs"].tolist(), expected)


# Requests


def ends(ran: Ran) -> list[dict[str, Any]]:
    """What is known of each request that has come to its end, aborted or not."""
    found, known = [], cached(ran)
    preempted: Counter[int] = Counter()
    for step in ran.core:
        preempted.update({output.request: output.preemptions for output in step.outputs})
    for asked, sample, request in everything(ran):
        reason = sample.reason or "abort"
        if request.finished and not sample.reason:
            # its siblings were aborted, so that nothing came back
            reason = "length" if len(request.tokens) == asked.ask.sampling["max_tokens"] else "stop"
        found.append(
            {
                "request_id": int(asked.id),
                "sample_index": sample.index,
                "finish_reason": reason,
                "num_prompt_tokens": len(request.prompt),
                "num_generation_tokens": len(request.tokens),
                "num_cached_tokens": known.get(request.number),
                "num_preemptions": preempted[request.number],
                "max_tokens": asked.ask.sampling.get("max_tokens", -1),
            }
        )
    return found


def test_added_finished_and_aborted_requests_are_counted(ran: Ran):
    known = ends(ran)
    if ran.has("num_added_reqs"):
        ran.same("num_added_reqs", int(ran.steps["num_added_reqs"].sum()), len(known))
    ran.same("num_finished_reqs", int(ran.steps["num_finished_reqs"].sum()), len(known))
    if ran.has("num_aborted_reqs"):
        aborted = sum(end["finish_reason"] == "abort" for end in known)
        ran.same("num_aborted_reqs", int(ran.steps["num_aborted_reqs"].sum()), aborted)


def test_each_sample_of_each_request_has_a_row_with_its_reason(ran: Ran):
    if ran.full:
        ran.same("finish_reason", rows_of(ran, "finish_reason"), known_of(ran, "finish_reason"))


@pytest.mark.parametrize(
    "column", ["num_prompt_tokens", "num_generation_tokens", "num_cached_tokens", "num_preemptions", "max_tokens"]
)
def test_rows_of_requests_say_what_came_back(ran: Ran, column: str):
    if not ran.full or not ran.has(column, kind="request"):
        return
    known = known_of(ran, column)
    # an aborted request may be gone before its first output told what it found
    unknown = {row[:2] for row in known if row[2] is None}
    rows = rows_of(ran, column)
    ran.same(column, [row for row in rows if row[:2] not in unknown], [row for row in known if row[:2] not in unknown])
    ran.same(f"{column} that is not known", {row[2] for row in rows if row[:2] in unknown} - {-1}, set())


def rows_of(ran: Ran, column: str) -> list[tuple[int, int, Any]]:
    """A column of the requests, by their id and the number of the sample."""
    return sorted((int(row["request_id"]), int(row["sample_index"]), row[column].item()) for row in ran.rows)


def known_of(ran: Ran, column: str) -> list[tuple[int, int, Any]]:
    return sorted((end["request_id"], end["sample_index"], end[column]) for end in ends(ran))


# Latencies


def test_a_time_to_first_token_for_each_first_output_and_a_latency_for_each_other(ran: Ran):
    if not ran.full:
        return
    first = [len(outputs) for outputs in firsts(ran)]
    ran.same("ttft_count", ran.steps["ttft_count"].tolist(), first)
    rest = [len(step.outputs) - n for step, n in zip(ran.core, first, strict=True)]
    ran.same("itl_count", ran.steps["itl_count"].tolist(), rest)
    ran.same("latencies", ran.latencies, {"time_to_first_token": sum(first), "inter_token_latency": sum(rest)})


# What is recorded inside the engine core


def test_each_batch_of_the_core_is_what_its_scheduler_and_pool_held(ran: Ran):
    recorded = {int(row["step"]): row for row in ran.core_steps}
    # with asynchronous scheduling the last batch waits for its result
    batches = [batch for batch in ran.batches if batch.number in recorded or not ran.asynchronous]
    assert len(batches) >= len(ran.batches) - 2, ran.say("batches")
    for column in core_view.Batch._fields[1:]:
        if column == "num_preempted_reqs" and any(act.what == "reset with the running" for act in acts(ran)):
            continue  # that preempts all that run, between two batches
        known = [int(recorded[batch.number][column]) for batch in batches]
        ran.same(f"{column} of the core", known, [getattr(batch, column) for batch in batches])


def acts(ran: Ran) -> list[cases.Act]:
    return [act for batch in ran.case.batches for act in batch.acts]


def test_kinds_of_tokens_and_of_blocks_add_up_in_each_step_of_the_core(ran: Ran):
    steps = ran.core_steps
    kinds = ("num_prefill_tokens", "num_recomputed_tokens", "num_decode_tokens", "num_spec_tokens")
    ran.same("kinds of tokens", sum(steps[k] for k in kinds).tolist(), steps["num_scheduled_tokens"].tolist())
    assert min(int(steps[kind].min(initial=0)) for kind in kinds) >= 0, ran.say("less than no tokens")
    states = ("num_kv_blocks_peak", "num_kv_blocks_cached", "num_kv_blocks_empty")
    ran.same("states of blocks", sum(steps[s] for s in states).tolist(), steps["num_kv_blocks"].tolist())


def test_a_request_that_has_ended_has_a_life_in_the_core(ran: Ran):
    lives = {(int(r["request_id"]), max(0, int(r["sample"]))): r for r in ran.core_requests}
    ran.same("lives", len(lives), len(ran.core_requests))
    for asked, sample, request in everything(ran):
        life = lives.pop((int(asked.id), sample.index))
        ran.same(f"prompt of {request.id}", int(life["num_prompt_tokens"]), len(request.prompt))
        if request.finished:
            ran.same(f"tokens of {request.id}", int(life["num_generation_tokens"]), len(request.tokens))
    ran.same("lives of others", list(lives), [])


# The reference model


PREDICTED = (
    "prefix_cache_requests",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "prefix_cache_preempted_requests",
    "prefix_cache_preempted_queries",
    "prefix_cache_preempted_hits",
    "num_running_reqs",
    "num_waiting_reqs",
)


def test_the_reference_model_predicts_each_step(ran: Ran):
    # the model knows no batches that are put together before the outputs of the last one are there
    if ran.case.settings.kind in ("drafts", "pooling") or ran.asynchronous or not ran.prediction.exact:
        return
    model = ran.prediction.steps
    for column in PREDICTED:
        if ran.has(column):
            expected = as_sent([getattr(seen, column) for seen in model], column, ran)
            ran.same(f"{column}, by the model", ran.steps[column].tolist(), expected)
    blocks = [seen.blocks_after if step.stats else -1 for seen, step in zip(model, ran.core, strict=True)]
    ran.same("blocks, by the model", ran.steps["num_kv_blocks_used"].tolist(), blocks)
    ran.same("cached, by the model", *paired(cached(ran), ran.prediction.cached))


def paired(known: dict[int, int | None], predicted: list[int | None]) -> tuple[list[Any], list[Any]]:
    some = [(number, value) for number, value in known.items() if value is not None]
    return some, [(number, predicted[number]) for number, _ in some]


# Bounds that hold under pressure too, where releases differ in what they look up and count


def as_sent(values: list[int], column: str, ran: Ran) -> list[int]:
    """What is known of a step in which the core made no stats: no state, and its counts come with the next stats."""
    sent, kept = [], 0
    for value, step in zip(values, ran.core, strict=True):
        if column in core_view.STATES:
            sent.append(value if step.stats else -1)
        else:
            kept += value
            sent.append(kept if step.stats else 0)
            kept = 0 if step.stats else kept
    return sent


def test_every_admitted_prompt_is_looked_up_at_least_once(ran: Ran):
    if not ran.caching:
        ran.same("prefix_cache_queries", int(ran.steps["prefix_cache_queries"].sum()), 0)
        return
    last = max((i for i, step in enumerate(ran.core) if step.stats), default=-1)
    admitted = {number for step in ran.core[: last + 1] for batch in step.scheduled for number in batch}
    prompts = sum(len(request.prompt) for request in ran.requests if request.number in admitted and request.looks_up)
    queries = int(ran.steps["prefix_cache_queries"].sum())
    if release.admission_only():
        ran.same("prefix_cache_queries", queries, prompts)
    else:
        assert queries >= prompts, ran.say(f"prefix_cache_queries: {queries}, but prompts of {prompts} were admitted")


def test_no_request_finds_more_than_it_shares_with_another(ran: Ran):
    size = ran.case.settings.options["block_size"]
    for number, found in cached(ran).items():
        request = ran.requests[number]
        others = [one.prompt + one.tokens for one in ran.requests if one is not request]
        shared = max((common(request.prompt, other) for other in others), default=0)
        most = min(shared, len(request.prompt) - 1) // size * size
        assert (found or 0) <= most, ran.say(f"{request.id} found {found} tokens, and shares {most}")
    if ran.caching:
        found_at_first = sum(found or 0 for found in cached(ran).values())
        hits = int(ran.steps["prefix_cache_hits"].sum())
        assert hits >= found_at_first, ran.say(f"prefix_cache_hits: {hits}, but requests were given {found_at_first}")


def common(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


# The summary


SUMMED = (
    "prefix_cache_queries",
    "prefix_cache_hits",
    "prefix_cache_preempted_queries",
    "prefix_cache_preempted_hits",
)


def test_the_accounts_of_a_case_alone_balance_or_are_explained(ran: Ran):
    accounts = ran.summary.accounts
    names = {account.name for account in accounts}
    assert names >= {"blocks in use"}, ran.say(f"accounts: {names}")
    assert [account for account in accounts if not account.ok] == [], ran.say(str(ran.summary))


def test_the_summary_adds_up_what_the_core_made(ran: Ran):
    for name in SUMMED:
        if ran.has(name):
            ran.same(name, ran.summed[name], sum(step.count(name) for step in ran.core))
    ran.same("steps", ran.summed["steps"], len(ran.core))
    ran.same("steps_without_stats", ran.summed["steps_without_stats"], sum(not step.stats for step in ran.core))
    tokens = sum(len(output.tokens) for step in ran.core for output in step.outputs)
    ran.same("num_generation_tokens", ran.summed["num_generation_tokens"], tokens)


def test_the_accounts_of_the_summary_balance(ran: Ran):
    ran.same("accounts", [account for account in ran.accounts if not account.ok], [])
