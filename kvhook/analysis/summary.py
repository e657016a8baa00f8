"""A run in numbers. `kvhook.text.summary` prints them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from kvhook.analysis.accounts import Account, accounts, is_pooling
from kvhook.analysis.core_report import CoreReport, report
from kvhook.analysis.distribution import Distribution, distribution
from kvhook.analysis.lives import EngineLife, lives, most_blocks, span
from kvhook.analysis.lookups import (
    Missed,
    NotLookedUp,
    SiblingHits,
    missed_by_vllm,
    never_looked_up,
    repeated,
    sibling_hits,
)
from kvhook.analysis.queue import queue_of_all
from kvhook.analysis.usage import NOT_SEEN, usage_of
from kvhook.records.columns import Table, floats, has, step_seconds, texts, total, with_stats
from kvhook.records.core import CoreRecords
from kvhook.records.levels import NOBODY_COUNTED, NOT_COUNTED, level_codes, steps_by_level, tokens_are_known
from kvhook.records.tables import Records
from kvhook.schema import COUNTED


@dataclasses.dataclass(frozen=True)
class Summary:
    """One run in numbers. Times in seconds unless the name says otherwise; what cannot be known is None.

    A mean over steps counts each step once, however long it took; per-second figures are per second spent *inside*
    ``LLMEngine.step``, so that a pause between two calls of ``generate`` does not dilute them.
    """

    #: vLLM and model behind the run
    vllm: str
    model: str
    engines: int
    #: each engine that made steps, in the order in which they began
    engine_lives: list[EngineLife]
    #: whether they are pooling models: nothing is generated
    pooling: bool

    steps: int
    steps_without_stats: int
    #: records that have the time of their stats, but no start and end of a step; they are left out of step times
    steps_without_times: int
    #: why, "" if that is not known
    why_steps_have_no_times: str
    #: level -> steps that were recorded at it: "full", "light", "sparse" (see `kvhook.install`)
    steps_by_level: dict[str, int]
    #: what `install(max_overhead=...)` changed: dictionaries with "step" (from which on), "level", "every" and "why"
    level_changes: list[dict[str, Any]]
    #: number of this summary -> why it is not known, or of which steps only
    not_recorded: dict[str, str]
    #: from the start of the first step to the end of the last
    wall_time: float
    time_in_steps: float
    step_time: Distribution

    #: KV blocks that can be used: the most that there were at one time, if there were several engines
    num_kv_blocks: int | None
    block_size: int | None
    #: groups of layers that share the blocks, and the tokens that fit into them as vLLM reckons
    num_kv_cache_groups: int | None
    kv_cache_size_tokens: int | None
    #: at the ends of the steps; None also where every request gave its blocks back before its step ended
    kv_cache_usage_mean: float | None
    kv_cache_usage_p95: float | None
    kv_cache_usage_peak: float | None
    #: when steps had been scheduled; where the scheduler is in another process, as its engine core recorded it
    kv_cache_usage_peak_in_step: float | None

    #: False where prefix caching was off: then there is no hit rate, rather than one of 0
    prefix_caching: bool | None
    prefix_cache_queries: int | None
    prefix_cache_hits: int | None
    #: hits / queries of this run; None without queries
    prefix_cache_hit_rate: float | None
    prefix_cache_preempted_queries: int | None
    prefix_cache_preempted_hits: int | None
    #: the share of all hit tokens that re-admitted (preempted) requests had on coming back: not among the hits above
    preempted_share_of_hits: float | None
    prefix_cache_resets: int | None
    #: what the samples of one prompt found of each other's, and what was found across prompts; None without samples
    sibling_hits: SiblingHits | None
    #: prompt tokens that never went through a look-up; None where the numbers show none
    never_looked_up: NotLookedUp | None
    #: tokens of which it is certain that they were looked up more than once while their request waited
    prefix_cache_repeated_queries: int
    #: what vLLM's own counters do not have; None where it has none, because the user's stats are off
    missed_by_vllm: Missed | None
    connector_prefix_cache_queries: int | None
    connector_prefix_cache_hits: int | None
    connector_prefix_cache_hit_rate: float | None
    #: what the prefix cache and the KV connector found together, of the tokens that were looked up
    combined_prefix_cache_hit_rate: float | None

    num_prompt_tokens: int | None
    num_prompt_tokens_computed: int | None
    num_prompt_tokens_cached: int | None
    num_generation_tokens: int | None
    prompt_tokens_per_second: float | None
    generation_tokens_per_second: float | None

    #: speculative decoding: drafts, the tokens in them, and those that were accepted
    num_drafts: int | None
    num_draft_tokens: int | None
    num_accepted_tokens: int | None
    draft_acceptance_rate: float | None
    #: tokens that a draft brought on average: 1 + accepted tokens / drafts
    mean_acceptance_length: float | None
    mm_cache_queries: int | None
    mm_cache_hits: int | None
    mm_cache_hit_rate: float | None
    #: LoRA adapters in a batch at most; None without LoRA
    max_loras: int | None

    #: peaks are those of one engine, never added up
    num_running_reqs_mean: float | None
    num_running_reqs_peak: int | None
    num_waiting_reqs_mean: float | None
    num_waiting_reqs_peak: int | None
    num_preempted_reqs: int | None
    num_finished_reqs: int | None
    finished_by_reason: dict[str, int]
    #: the aborted part of the finished requests
    num_aborted_reqs: int | None
    #: requests that were in the queue before the first step, were added since, and are in the queue after the last one
    num_reqs_before: int | None
    num_added_reqs: int | None
    num_reqs_at_end: int | None

    time_to_first_token: Distribution
    inter_token_latency: Distribution
    mean_time_per_output_token: Distribution
    e2e_latency: Distribution

    #: kvhook's own cost per step in ns: sampled, plus `hook_call_ns` for the wrapped call itself
    kvhook_ns_p50: float | None
    kvhook_ns_p99: float | None
    #: kvhook's share of the time inside steps
    kvhook_share: float | None
    #: vLLM's part: what its front end took to make iteration stats because kvhook had turned them on, sampled as well;
    #: None where the user had them on anyway, or it cannot be timed
    vllm_stats_ns_p50: float | None
    vllm_stats_share: float | None

    #: records that were overwritten or damaged before they were read
    records_lost: int
    #: records that fell out of a bounded history
    records_dropped: int
    #: column -> why this vLLM cannot fill it
    absent: dict[str, str]
    #: pairs of numbers that must be equal, what explains their difference, and whether it is explained
    accounts: list[Account]
    #: what failed inside kvhook, if anything did
    faults: dict[str, str]
    #: what to do if there are no steps
    why_no_steps: str
    #: what was recorded inside the engine cores; None where nothing was. Without the ledger of blocks
    core: CoreReport | None = None

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain dictionaries, numbers and None: what ``json.dumps`` takes. NaN becomes None."""
        return {f.name: _json_value(getattr(self, f.name)) for f in dataclasses.fields(self)}


_FIELDS = frozenset(f.name for f in dataclasses.fields(Summary))
#: what needs records of single requests, or their clocks
_ONLY_FULL = (
    "time_to_first_token",
    "inter_token_latency",
    "mean_time_per_output_token",
    "e2e_latency",
    "finished_by_reason",
)
_USAGE = ("kv_cache_usage_mean", "kv_cache_usage_p95", "kv_cache_usage_peak", "kv_cache_usage_peak_in_step")


def summarize(records: Records, engine: int | None = None, cores: CoreRecords | None = None) -> Summary:
    """Reduce a run to its summary.

    Args:
        records: the run.
        engine: only this engine of it; all of them together otherwise.
        cores: what its engine cores recorded. Which core belongs to which engine is known only of one, so that they
            count only where the run has one engine, or all are meant.
    """
    with np.errstate(all="ignore"):  # numbers out of a damaged file may be anything
        summary = _summarize(records, engine)
        if cores is None or not len(cores) or (engine is not None and len(records.meta["engines"]) > 1):
            return summary
        core = report(cores, ledger=False)
        if not core.num_steps:
            return summary
        peak = summary.kv_cache_usage_peak_in_step
        if peak is None and len(cores) == 1:
            peak = core.usage_peak(records.meta["engines"])
        return dataclasses.replace(summary, core=core, kv_cache_usage_peak_in_step=peak)


def _summarize(records: Records, engine: int | None) -> Summary:
    steps, requests = records.steps(engine), records.requests(engine)
    meta = records.meta
    engines = [e for e in meta["engines"] if engine is None or e["engine"] == engine]
    known = with_stats(steps)
    seconds = step_seconds(steps)
    inside = float(seconds.sum())
    worked = lives(steps, engines)
    begun, over = span(steps) if len(steps) else (0, 0)
    missing = int(meta["records_lost"]) + int(meta["records_dropped"]) + int(meta["damaged"])
    queue = queue_of_all(steps, requests, [life.engine for life in worked])
    usage = usage_of(steps)
    caching = [e.get("enable_prefix_caching") for e in engines]
    prefix_on = None if None in caching or not caching else any(caching)
    queries, hits = total(steps, "prefix_cache_queries"), total(steps, "prefix_cache_hits")
    again_queries = total(steps, "prefix_cache_preempted_queries")
    again = total(steps, "prefix_cache_preempted_hits")
    levels = steps_by_level(steps)
    counted: dict[str, int | None] = dict.fromkeys(COUNTED)
    nobody_counted = any(e.get("tokens_not_counted") for e in engines)
    if tokens_are_known(levels) and not nobody_counted:
        counted = {name: total(steps, name) for name in COUNTED}
        counted["num_finished_reqs"] = _finished(steps, requests, levels)
    prompt, generated = counted["num_prompt_tokens"], counted["num_generation_tokens"]
    running, waiting = floats(known, "num_running_reqs"), floats(known, "num_waiting_reqs")
    reasons, reason_counts = np.unique(texts(requests, "finish_reason"), return_counts=True)
    cost = _cost(steps, "kvhook_ns", max((e.get("hook_call_ns") or 0 for e in engines), default=0))
    made = _cost(steps, "vllm_stats_ns", 0)
    external, asked = (total(steps, f"connector_prefix_cache_{what}") for what in ("hits", "queries"))
    drafts, accepted = total(steps, "num_drafts"), total(steps, "num_accepted_tokens")
    mm_queries, mm_hits = total(steps, "mm_cache_queries"), total(steps, "mm_cache_hits")
    vllm = str(meta["vllm"])
    # where records are missing, or releases differ, the sums of look-ups and of prompts do not belong together
    together = queue if not missing and prefix_on and {str(e.get("vllm") or vllm) for e in engines} == {vllm} else None
    not_recorded = _not_recorded(levels, len(steps), NOBODY_COUNTED if nobody_counted else "")
    if usage.not_seen:
        not_recorded |= dict.fromkeys(_USAGE, NOT_SEEN)
    return Summary(
        vllm=vllm,
        model=str(engines[0].get("model") or "") if engines else "",
        engines=len(engines),
        engine_lives=worked,
        pooling=is_pooling(steps, requests, engines),
        steps=len(steps),
        steps_without_stats=len(steps) - len(known),
        steps_without_times=len(steps) - len(seconds),
        why_steps_have_no_times=next((w for e in engines if (w := e.get("steps_without_times"))), ""),
        steps_by_level=levels,
        level_changes=[c for e in engines for c in _changes(e)],
        not_recorded=not_recorded,
        wall_time=(over - begun) / 1e9,
        time_in_steps=inside,
        step_time=distribution(seconds),
        num_kv_blocks=most_blocks(worked) or max((e.get("num_kv_blocks") or 0 for e in engines), default=0) or None,
        block_size=_same(engines, "block_size"),
        num_kv_cache_groups=_same(engines, "num_kv_cache_groups"),
        kv_cache_size_tokens=_same(engines, "kv_cache_size_tokens"),
        kv_cache_usage_mean=usage.mean,
        kv_cache_usage_p95=usage.p95,
        kv_cache_usage_peak=usage.peak,
        kv_cache_usage_peak_in_step=usage.peak_in_step,
        prefix_caching=prefix_on,
        prefix_cache_queries=queries,
        prefix_cache_hits=hits,
        prefix_cache_hit_rate=_ratio(hits, queries),
        prefix_cache_preempted_queries=again_queries,
        prefix_cache_preempted_hits=again,
        preempted_share_of_hits=_ratio(again, None if again is None or hits is None else hits + again),
        prefix_cache_resets=total(steps, "prefix_cache_reset"),
        sibling_hits=sibling_hits(requests),
        never_looked_up=never_looked_up(steps, vllm, together),
        prefix_cache_repeated_queries=repeated(steps, requests, vllm, together),
        missed_by_vllm=missed_by_vllm(steps, engines),
        connector_prefix_cache_queries=asked,
        connector_prefix_cache_hits=external,
        connector_prefix_cache_hit_rate=_ratio(external, asked),
        combined_prefix_cache_hit_rate=_ratio((hits or 0) + external, queries) if external is not None else None,
        num_prompt_tokens=prompt,
        num_prompt_tokens_computed=counted["num_prompt_tokens_computed"],
        num_prompt_tokens_cached=counted["num_prompt_tokens_cached"],
        num_generation_tokens=generated,
        prompt_tokens_per_second=_ratio(prompt, inside),
        generation_tokens_per_second=_ratio(generated, inside),
        num_drafts=drafts,
        num_draft_tokens=(drafted := total(steps, "num_draft_tokens")),
        num_accepted_tokens=accepted,
        draft_acceptance_rate=_ratio(accepted, drafted),
        mean_acceptance_length=1 + accepted / drafts if accepted is not None and drafts else None,
        mm_cache_queries=mm_queries,
        mm_cache_hits=mm_hits,
        mm_cache_hit_rate=_ratio(mm_hits, mm_queries),
        max_loras=max((e.get("max_loras") or 0 for e in engines), default=0) or None,
        num_running_reqs_mean=float(running.mean()) if len(running) else None,
        num_running_reqs_peak=int(running.max()) if len(running) else None,
        num_waiting_reqs_mean=float(waiting.mean()) if len(waiting) else None,
        num_waiting_reqs_peak=int(waiting.max()) if len(waiting) else None,
        num_preempted_reqs=counted["num_preempted_reqs"],
        num_finished_reqs=counted["num_finished_reqs"],
        finished_by_reason=dict(zip(reasons.tolist(), reason_counts.tolist(), strict=True)),
        num_aborted_reqs=total(steps, "num_aborted_reqs"),
        num_reqs_before=queue.before if queue else None,
        num_added_reqs=total(steps, "num_added_reqs"),
        num_reqs_at_end=queue.at_end if queue else None,
        time_to_first_token=distribution(*records.latencies("time_to_first_token", engine)),
        inter_token_latency=distribution(*records.latencies("inter_token_latency", engine)),
        mean_time_per_output_token=_time_per_output_token(requests),
        e2e_latency=distribution(floats(requests, "e2e_latency")),
        kvhook_ns_p50=float(np.median(cost)) if len(cost) else None,
        kvhook_ns_p99=float(np.quantile(cost, 0.99)) if len(cost) else None,
        kvhook_share=_ratio(float(cost.mean()) * len(seconds) / 1e9 if len(cost) else None, inside),
        vllm_stats_ns_p50=float(np.median(made)) if len(made) else None,
        vllm_stats_share=_ratio(float(made.mean()) * _made_for_us(steps, engines) / 1e9, inside) if len(made) else None,
        # a damaged record is a gap in the numbers as well, unless it was the last
        records_lost=max(int(meta["records_lost"]), int(meta["damaged"])),
        records_dropped=int(meta["records_dropped"]),
        absent=dict(meta["absent"]),
        accounts=accounts(steps, requests, engines, missing),
        faults=dict(meta.get("faults", {})),
        why_no_steps=str(meta.get("why_no_steps", "")),
    )


def _same(engines: list[dict[str, Any]], fact: str) -> Any:
    """A fact that all engines share; None if they differ or do not say it."""
    values = {e.get(fact) for e in engines}
    return values.pop() if len(values) == 1 else None


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def _time_per_output_token(requests: Table) -> Distribution:
    """Of requests that generated more than one token: the first one is prefill (vLLM's own definition)."""
    if not has(requests, "num_generation_tokens"):
        return distribution(())
    several = requests[requests["num_generation_tokens"] > 1]
    values = floats(several, "mean_time_per_output_token")
    if not len(values) and has(requests, "decode_time"):
        values = several["decode_time"] / (several["num_generation_tokens"] - 1)
    return distribution(values)


def _cost(steps: Table, column: str, call_ns: int) -> npt.NDArray[np.float64]:
    """What a step cost, of the steps in which it was measured."""
    cost = floats(steps, column)
    return cost[cost >= 0] + call_ns


def _made_for_us(steps: Table, engines: list[dict[str, Any]]) -> int:
    """Steps in which vLLM made iteration stats only because of kvhook."""
    of = [e["engine"] for e in engines if e.get("stats_for_kvhook")]
    return int((np.isin(steps["engine"], of) & (level_codes(steps) == 0)).sum())


def _changes(engine: dict[str, Any]) -> list[dict[str, Any]]:
    """The changes of level among an engine's facts, without entries that a damaged file may have there."""
    levels = engine.get("levels")
    if not isinstance(levels, list):
        return []
    return [c for c in levels if isinstance(c, dict) and isinstance(c.get("why"), str)]


def _not_recorded(levels: dict[str, int], steps: int, lost: str) -> dict[str, str]:
    """Number of the summary -> why it is not known, or of which steps only, because of the level."""
    full = levels.get("full", 0)
    out = {}
    if full < steps:
        why = f"of {full:,} of {steps:,} steps only: the others are" if full else "this run is"
        out = dict.fromkeys(_ONLY_FULL, f"{why} recorded at level light, without single requests and their clocks")
    if lost or not tokens_are_known(levels):
        sums = (*(c for c in COUNTED if c in _FIELDS), "prompt_tokens_per_second", "generation_tokens_per_second")
        out |= dict.fromkeys(sums, lost or NOT_COUNTED)
    return out


def _finished(steps: Table, requests: Table, levels: dict[str, int]) -> int:
    """Finished requests: their records, or at level light their count."""
    return len(requests) if levels.keys() <= {"full"} else int(floats(steps, "num_finished_reqs").sum())


def _json_value(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _json_value(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return value._asdict() if hasattr(value, "_asdict") else list(value)
    if isinstance(value, list):
        return [_json_value(one) for one in value]
    if isinstance(value, float) and math.isnan(value):
        return None
    return value
