"""Makes the summary of a run."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from kvhook.analysis.accounts import accounts, is_pooling, queue_of_all
from kvhook.analysis.core_report import CoreReport, report
from kvhook.analysis.diagnosis.rules import diagnose
from kvhook.analysis.diagnosis.signs import signs_of
from kvhook.analysis.distribution import NOTHING, Distribution
from kvhook.analysis.engine_events import event_totals
from kvhook.analysis.lives import lives, most_blocks
from kvhook.analysis.lookups import missed_by_vllm, never_looked_up, repeated
from kvhook.analysis.part import Part
from kvhook.analysis.siblings import SiblingHits
from kvhook.analysis.step_totals import StepTotals
from kvhook.analysis.summary import GroupRate, Summary
from kvhook.analysis.totals import Totals
from kvhook.analysis.usage import NOT_SEEN, usage_of
from kvhook.analysis.values import Values
from kvhook.records.core import CoreRecords
from kvhook.records.levels import NOBODY_COUNTED, NOT_COUNTED, tokens_are_known
from kvhook.records.run import Run
from kvhook.records.tables import Records
from kvhook.schema import COUNTED, NAMES

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
    """Reduce a run to its summary: one pass over its records.

    Args:
        records: the run.
        engine: only this engine of it; all of them together otherwise.
        cores: what its engine cores recorded, see `summary_of`.
    """
    totals = add_up(records)
    assert totals is not None
    return summary_of(totals, records, engine, account_of(cores))


def add_up(records: Records, *, warmup: bool = True) -> Totals | None:
    """The totals of a run, by one pass over its records; None if there is a warm-up in it, and it is not wanted."""
    totals = Totals()
    with np.errstate(all="ignore"):  # numbers out of a damaged file may be anything
        return totals if records.go_over(totals.take, warmup=warmup) else None


def account_of(cores: CoreRecords | None) -> CoreReport | None:
    """The account of a run's engine cores; None without any."""
    return report(cores, ledger=False) if cores is not None and len(cores) else None


def summary_of(totals: Totals, run: Run, engine: int | None = None, core: CoreReport | None = None) -> Summary:
    """The summary of a run that has been added up.

    Args:
        totals: of its records.
        run: what is known of it.
        engine: only this engine of it; all of them together otherwise.
        core: the account of its engine cores. Which core belongs to which engine is known only of one, so that it
            counts only where the run has one engine, or all are meant.
    """
    columns = {kind: frozenset(c.name for c in run.columns(kind)) for kind in ("step", "request")}
    engines = [e for e in run.meta["engines"] if engine is None or e["engine"] == engine]
    part = Part(totals, engines, columns)
    with np.errstate(all="ignore"):
        summary = _summary(totals, part, run.meta)
        by_label, by_lora_name = (group_rates(part, run, column) for column in NAMES)
        prompts = part.requests.prompt_groups.outline()
        events = event_totals(run.engine_events, engine, part.steps.span if summary.part else None)
        summary = dataclasses.replace(
            summary, by_label=by_label, by_lora_name=by_lora_name, by_prompt=prompts, engine_events=events
        )
        if core is not None and core.num_steps and (engine is None or len(run.meta["engines"]) <= 1):
            peak = summary.kv_cache_usage_peak_in_step
            if peak is None and core.num_cores == 1:
                peak = core.usage_peak(run.meta["engines"])
            summary = dataclasses.replace(summary, core=core, kv_cache_usage_peak_in_step=peak)
        return dataclasses.replace(summary, findings=diagnose(signs_of(summary, part)))


def _summary(totals: Totals, part: Part, meta: dict[str, Any]) -> Summary:
    steps, requests, engines, total = part.steps, part.requests, part.engines, part.total
    inside = steps.nanoseconds / 1e9
    worked = lives(totals, part)
    begun, over = steps.span
    missing = int(meta["records_lost"]) + int(meta["records_dropped"]) + int(meta["damaged"])
    queue = queue_of_all(totals, part)
    usage = usage_of(part)
    caching = [e.get("enable_prefix_caching") for e in engines]
    prefix_on = None if None in caching or not caching else any(caching)
    queries, hits = total("prefix_cache_queries"), total("prefix_cache_hits")
    again_queries = total("prefix_cache_preempted_queries")
    again = total("prefix_cache_preempted_hits")
    levels = steps.by_level
    counted: dict[str, int | None] = dict.fromkeys(COUNTED)
    nobody_counted = any(e.get("tokens_not_counted") for e in engines)
    if tokens_are_known(levels) and not nobody_counted:
        counted = {name: total(name) for name in COUNTED}
        # finished requests: their records, or at level light their count
        counted["num_finished_reqs"] = requests.count if levels.keys() <= {"full"} else total("num_finished_reqs") or 0
    prompt, generated = counted["num_prompt_tokens"], counted["num_generation_tokens"]
    cost = _Cost(steps.cost if part.has("kvhook_ns") else None, engines)
    made = _Cost(steps.made if part.has("vllm_stats_ns") else None, ())
    external, asked = (total(f"connector_prefix_cache_{what}") for what in ("hits", "queries"))
    drafts, accepted = total("num_drafts"), total("num_accepted_tokens")
    mm_queries, mm_hits = total("mm_cache_queries"), total("mm_cache_hits")
    vllm = str(meta["vllm"])
    # where records are missing, or releases differ, the sums of look-ups and of prompts do not belong together
    together = queue if not missing and prefix_on and {str(e.get("vllm") or vllm) for e in engines} == {vllm} else None
    not_recorded = _not_recorded(levels, steps.steps, NOBODY_COUNTED if nobody_counted else "")
    if usage.not_seen:
        not_recorded |= dict.fromkeys(_USAGE, NOT_SEEN)
    return Summary(
        vllm=vllm,
        model=str(engines[0].get("model") or "") if engines else "",
        engines=len(engines),
        engine_lives=worked,
        pooling=is_pooling(part),
        steps=steps.steps,
        steps_without_stats=steps.steps - steps.known,
        steps_without_times=steps.steps - steps.timed,
        why_steps_have_no_times=next((w for e in engines if (w := e.get("steps_without_times"))), ""),
        steps_by_level=levels,
        level_changes=[c for e in engines for c in _changes(e)],
        not_recorded=not_recorded,
        wall_time=(over - begun) / 1e9,
        time_in_steps=inside,
        step_time=_step_time(steps, inside),
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
        prefix_cache_resets=total("prefix_cache_reset"),
        sibling_hits=_siblings(part),
        never_looked_up=never_looked_up(part, vllm, together),
        prefix_cache_repeated_queries=repeated(part, vllm, together),
        missed_by_vllm=missed_by_vllm(part, totals),
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
        num_draft_tokens=(drafted := total("num_draft_tokens")),
        num_accepted_tokens=accepted,
        draft_acceptance_rate=_ratio(accepted, drafted),
        mean_acceptance_length=1 + accepted / drafts if accepted is not None and drafts else None,
        mm_cache_queries=mm_queries,
        mm_cache_hits=mm_hits,
        mm_cache_hit_rate=_ratio(mm_hits, mm_queries),
        max_loras=max((e.get("max_loras") or 0 for e in engines), default=0) or None,
        num_running_reqs_mean=_state_mean(part, "num_running_reqs"),
        num_running_reqs_peak=steps.known_peaks.get("num_running_reqs") if part.has("num_running_reqs") else None,
        num_waiting_reqs_mean=_state_mean(part, "num_waiting_reqs"),
        num_waiting_reqs_peak=steps.known_peaks.get("num_waiting_reqs") if part.has("num_waiting_reqs") else None,
        num_preempted_reqs=counted["num_preempted_reqs"],
        num_finished_reqs=counted["num_finished_reqs"],
        finished_by_reason=requests.by_reason if part.has_request("finish_reason") else {},
        num_aborted_reqs=total("num_aborted_reqs"),
        num_reqs_before=queue.before if queue else None,
        num_added_reqs=total("num_added_reqs"),
        num_reqs_at_end=queue.at_end if queue else None,
        time_to_first_token=_latencies(part, "ttft"),
        inter_token_latency=_latencies(part, "itl"),
        mean_time_per_output_token=_time_per_output_token(part),
        e2e_latency=requests.e2e.describe() if part.has_request("e2e_latency") else NOTHING,
        kvhook_ns_p50=cost.median,
        kvhook_ns_p99=cost.p99,
        kvhook_share=cost.share(steps.timed, inside),
        vllm_stats_ns_p50=made.median,
        vllm_stats_share=made.share(_made_for_us(totals, engines), inside),
        # a damaged record is a gap in the numbers as well, unless it was the last
        records_lost=max(int(meta["records_lost"]), int(meta["damaged"])),
        records_dropped=int(meta["records_dropped"]),
        absent=dict(meta["absent"]),
        accounts=accounts(totals, part, missing),
        faults=dict(meta.get("faults", {})),
        why_no_steps=str(meta.get("why_no_steps", "")),
        part=str(meta.get("part", "")),
        clock_drift_ns=int(meta["clock_drift_ns"]),
    )


def group_rates(part: Part, run: Run, column: str) -> list[GroupRate]:
    """The requests by their label or their adapter, those with the most prompt tokens first; none if none has one."""
    names, groups = run.names(column), dict[str, Counter[str]]()
    for code, counts in part.requests.groups[column].items():
        # traces side by side have codes of their own for the same name
        name = "" if code < 0 else names.get(code, str(code))
        groups.setdefault(name, Counter()).update(counts)
    if groups.keys() <= {""}:
        return []
    out = [
        GroupRate(
            name=name,
            requests=group["requests"],
            num_prompt_tokens=group["prompt"],
            num_cached_tokens=group["cached"] if group["tell"] else None,
            num_generation_tokens=group["generated"],
            hit_rate=_ratio(group["cached"] if group["tell"] else None, group["asked"]),
        )
        for name, group in groups.items()
    ]
    return sorted(out, key=lambda rate: (-rate.num_prompt_tokens, rate.name))


def _same(engines: Sequence[dict[str, Any]], fact: str) -> Any:
    """A fact that all engines share; None if they differ or do not say it."""
    values = {e.get(fact) for e in engines}
    return values.pop() if len(values) == 1 else None


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def _state_mean(part: Part, name: str) -> float | None:
    known = part.steps.known if part.has(name) else 0
    return part.steps.known_sums[name] / known if known else None


def _step_time(steps: StepTotals, inside: float) -> Distribution:
    return dataclasses.replace(steps.seconds.describe(), mean=inside / steps.timed) if steps.timed else NOTHING


def _siblings(part: Part) -> SiblingHits | None:
    names = ("request_id", "sample_index", "num_cached_tokens")
    return part.requests.siblings.hits() if all(map(part.has_request, names)) else None


def _latencies(part: Part, prefix: str) -> Distribution:
    return part.steps.latencies[prefix].describe() if part.has(f"{prefix}_count") else NOTHING


def _time_per_output_token(part: Part) -> Distribution:
    """Of requests that generated more than one token: the first one is prefill (vLLM's own definition)."""
    if not part.has_request("num_generation_tokens"):
        return NOTHING
    if part.has_request("mean_time_per_output_token"):
        return part.requests.per_token.describe()
    return part.requests.decode_per_token.describe() if part.has_request("decode_time") else NOTHING


class _Cost:
    """What a step cost in nanoseconds, of the steps in which it was measured, with the call itself; None if unknown."""

    def __init__(self, values: Values | None, engines: Iterable[dict[str, Any]]) -> None:
        self._values = values if values is not None and values.count else None
        self._call = max((e.get("hook_call_ns") or 0 for e in engines), default=0)

    @property
    def median(self) -> float | None:
        return self._values.median(self._call) if self._values else None

    @property
    def p99(self) -> float | None:
        return self._values.nth(0.99, self._call) if self._values else None

    def share(self, steps: int, inside: float) -> float | None:
        """The share of the time inside steps that it took in so many steps."""
        return _ratio((self._values.mean + self._call) * steps / 1e9, inside) if self._values else None


def _made_for_us(totals: Totals, engines: Iterable[dict[str, Any]]) -> int:
    """Steps in which vLLM made iteration stats only because of kvhook."""
    return totals.of([e["engine"] for e in engines if e.get("stats_for_kvhook")]).steps.full


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
