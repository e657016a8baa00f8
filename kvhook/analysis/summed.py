"""The numbers of a summary, a function for each of its parts. `kvhook.analysis.summarize` puts them together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from kvhook.analysis.accounts import accounts, is_pooling, queue_of_all
from kvhook.analysis.distribution import NOTHING, Distribution
from kvhook.analysis.lives import lives, most_blocks
from kvhook.analysis.lookups import missed_by_vllm, never_looked_up, repeated
from kvhook.analysis.part import Part
from kvhook.analysis.queue import Queue
from kvhook.analysis.siblings import SiblingHits
from kvhook.analysis.step_totals import StepTotals
from kvhook.analysis.summary import Summary
from kvhook.analysis.totals import Totals
from kvhook.analysis.usage import NOT_SEEN, usage_of
from kvhook.analysis.values import Values
from kvhook.records.levels import NOBODY_COUNTED, NOT_COUNTED, tokens_are_known
from kvhook.schema import COUNTED

#: Numbers of a summary, by their names.
Numbers = dict[str, Any]

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
#: Sums over all steps that are numbers of a summary as they are, by the names that both have.
_TOTALS = (
    *("prefix_cache_queries", "prefix_cache_hits"),
    *("prefix_cache_preempted_queries", "prefix_cache_preempted_hits"),
    *("connector_prefix_cache_queries", "connector_prefix_cache_hits"),
    *("num_drafts", "num_draft_tokens", "num_accepted_tokens"),
    *("mm_cache_queries", "mm_cache_hits"),
    *("num_aborted_reqs", "num_added_reqs"),
)


class Sums:
    """A run that has been added up, and what several numbers need of it.

    Args:
        totals: of its records.
        part: what is wanted of them.
        meta: what is known of the run.
    """

    def __init__(self, totals: Totals, part: Part, meta: Numbers) -> None:
        self.totals, self.part, self.meta = totals, part, meta
        self.steps, self.requests, self.engines = part.steps, part.requests, part.engines
        self.inside = self.steps.nanoseconds / 1e9
        self.levels = self.steps.by_level
        self.vllm = str(meta["vllm"])
        self.missing = int(meta["records_lost"]) + int(meta["records_dropped"]) + int(meta["damaged"])
        self.nobody_counted = any(e.get("tokens_not_counted") for e in self.engines)
        self.all = {name: part.total(name) for name in _TOTALS}

    @cached_property
    def queue(self) -> Queue | None:
        """The requests before, in and after the run."""
        return queue_of_all(self.totals, self.part)

    @cached_property
    def prefix_caching(self) -> bool | None:
        """Whether an engine had a prefix cache; None if that is not known of one."""
        caching = [e.get("enable_prefix_caching") for e in self.engines]
        return None if None in caching or not caching else any(caching)

    @cached_property
    def counted(self) -> dict[str, int | None]:
        """The sums of what is counted of outputs, where it was."""
        if not tokens_are_known(self.levels) or self.nobody_counted:
            return dict.fromkeys(COUNTED)
        found = {name: self.part.total(name) for name in COUNTED}
        # finished requests: their records, or at level light their count
        full = self.levels.keys() <= {"full"}
        found["num_finished_reqs"] = self.requests.count if full else self.part.total("num_finished_reqs") or 0
        return found


def numbers_of(totals: Totals, part: Part, meta: Numbers) -> Numbers:
    """All numbers of a summary that follow from a run's sums."""
    sums = Sums(totals, part, meta)
    found = dict(sums.all)
    for some in (_run, _steps, _usage, _lookups, _other_caches, _tokens, _queue, _latencies, _own):
        found |= some(sums)
    return found


def _run(s: Sums) -> Numbers:
    worked = lives(s.totals, s.part)
    return {
        "vllm": s.vllm,
        "model": str(s.engines[0].get("model") or "") if s.engines else "",
        "engines": len(s.engines),
        "engine_lives": worked,
        "pooling": is_pooling(s.part),
        "num_kv_blocks": most_blocks(worked) or _most(s, "num_kv_blocks"),
        "block_size": _same(s.engines, "block_size"),
        "num_kv_cache_groups": _same(s.engines, "num_kv_cache_groups"),
        "kv_cache_size_tokens": _same(s.engines, "kv_cache_size_tokens"),
        "prefix_caching": s.prefix_caching,
        "max_loras": _most(s, "max_loras"),
        "part": str(s.meta.get("part", "")),
        "not_closed": str(s.meta.get("not_closed", "")),
        "clock_drift_ns": int(s.meta["clock_drift_ns"]),
    }


def _steps(s: Sums) -> Numbers:
    begun, over = s.steps.span
    return {
        "steps": s.steps.steps,
        "steps_without_stats": s.steps.steps - s.steps.known,
        "steps_without_times": s.steps.steps - s.steps.timed,
        "why_steps_have_no_times": next((w for e in s.engines if (w := e.get("steps_without_times"))), ""),
        "steps_by_level": s.levels,
        "level_changes": [c for e in s.engines for c in _changes(e)],
        "wall_time": (over - begun) / 1e9,
        "time_in_steps": s.inside,
        "step_time": _step_time(s.steps, s.inside),
        "why_no_steps": str(s.meta.get("why_no_steps", "")),
    }


def _usage(s: Sums) -> Numbers:
    usage = usage_of(s.part)
    unknown = _not_recorded(s.levels, s.steps.steps, NOBODY_COUNTED if s.nobody_counted else "")
    return {
        "kv_cache_usage_mean": usage.mean,
        "kv_cache_usage_p95": usage.p95,
        "kv_cache_usage_peak": usage.peak,
        "kv_cache_usage_peak_in_step": usage.peak_in_step,
        "not_recorded": unknown | (dict.fromkeys(_USAGE, NOT_SEEN) if usage.not_seen else {}),
    }


def _lookups(s: Sums) -> Numbers:
    again, hits = s.all["prefix_cache_preempted_hits"], s.all["prefix_cache_hits"]
    releases = {str(e.get("vllm") or s.vllm) for e in s.engines}
    # where records are missing, or releases differ, the sums of look-ups and of prompts do not belong together
    together = s.queue if not s.missing and s.prefix_caching and releases == {s.vllm} else None
    return {
        "prefix_cache_hit_rate": ratio(hits, s.all["prefix_cache_queries"]),
        "preempted_share_of_hits": ratio(again, None if again is None or hits is None else hits + again),
        "prefix_cache_resets": s.part.total("prefix_cache_reset"),
        "sibling_hits": _siblings(s.part),
        "never_looked_up": never_looked_up(s.part, s.vllm, together),
        "prefix_cache_repeated_queries": repeated(s.part, s.vllm, together),
        "missed_by_vllm": missed_by_vllm(s.part, s.totals),
    }


def _other_caches(s: Sums) -> Numbers:
    external, asked = s.all["connector_prefix_cache_hits"], s.all["connector_prefix_cache_queries"]
    both = None if external is None else (s.all["prefix_cache_hits"] or 0) + external
    return {
        "connector_prefix_cache_hit_rate": ratio(external, asked),
        "combined_prefix_cache_hit_rate": ratio(both, s.all["prefix_cache_queries"]),
        "mm_cache_hit_rate": ratio(s.all["mm_cache_hits"], s.all["mm_cache_queries"]),
    }


def _tokens(s: Sums) -> Numbers:
    prompt, generated = s.counted["num_prompt_tokens"], s.counted["num_generation_tokens"]
    drafts, accepted = s.all["num_drafts"], s.all["num_accepted_tokens"]
    return {
        "num_prompt_tokens": prompt,
        "num_prompt_tokens_computed": s.counted["num_prompt_tokens_computed"],
        "num_prompt_tokens_cached": s.counted["num_prompt_tokens_cached"],
        "num_generation_tokens": generated,
        "prompt_tokens_per_second": ratio(prompt, s.inside),
        "generation_tokens_per_second": ratio(generated, s.inside),
        "draft_acceptance_rate": ratio(accepted, s.all["num_draft_tokens"]),
        "mean_acceptance_length": 1 + accepted / drafts if accepted is not None and drafts else None,
    }


def _queue(s: Sums) -> Numbers:
    found: Numbers = {}
    for name in ("num_running_reqs", "num_waiting_reqs"):
        found[f"{name}_mean"] = _state_mean(s.part, name)
        found[f"{name}_peak"] = s.steps.known_peaks.get(name) if s.part.has(name) else None
    return found | {
        "num_preempted_reqs": s.counted["num_preempted_reqs"],
        "num_finished_reqs": s.counted["num_finished_reqs"],
        "finished_by_reason": s.requests.by_reason if s.part.has_request("finish_reason") else {},
        "num_reqs_before": s.queue.before if s.queue else None,
        "num_reqs_at_end": s.queue.left if s.queue else None,
    }


def _latencies(s: Sums) -> Numbers:
    return {
        "time_to_first_token": _latency(s.part, "ttft"),
        "inter_token_latency": _latency(s.part, "itl"),
        "mean_time_per_output_token": _time_per_output_token(s.part),
        "e2e_latency": s.requests.e2e.describe() if s.part.has_request("e2e_latency") else NOTHING,
    }


def _own(s: Sums) -> Numbers:
    """What kvhook cost and lost, and whether its accounts balance."""
    cost = _Cost(s.steps.cost if s.part.has("kvhook_ns") else None, s.engines)
    made = _Cost(s.steps.made if s.part.has("vllm_stats_ns") else None, ())
    return {
        "kvhook_ns_p50": cost.median,
        "kvhook_ns_p99": cost.p99,
        "kvhook_share": cost.share(s.steps.timed, s.inside),
        "vllm_stats_ns_p50": made.median,
        "vllm_stats_share": made.share(_made_for_us(s.totals, s.engines), s.inside),
        # a damaged record is a gap in the numbers as well, unless it was the last
        "records_lost": max(int(s.meta["records_lost"]), int(s.meta["damaged"])),
        "records_dropped": int(s.meta["records_dropped"]),
        "absent": dict(s.meta["absent"]),
        "accounts": accounts(s.totals, s.part, s.missing),
        "faults": dict(s.meta.get("faults", {})),
    }


def _most(s: Sums, fact: str) -> int | None:
    return max((e.get(fact) or 0 for e in s.engines), default=0) or None


def _same(engines: Sequence[dict[str, Any]], fact: str) -> Any:
    """A fact that all engines share; None if they differ or do not say it."""
    values = {e.get(fact) for e in engines}
    return values.pop() if len(values) == 1 else None


def ratio(part: float | None, whole: float | None) -> float | None:
    """A share; None where there is nothing to be a share of."""
    return part / whole if part is not None and whole else None


def _state_mean(part: Part, name: str) -> float | None:
    known = part.steps.known if part.has(name) else 0
    return part.steps.known_sums[name] / known if known else None


def _step_time(steps: StepTotals, inside: float) -> Distribution:
    return dataclasses.replace(steps.seconds.describe(), mean=inside / steps.timed) if steps.timed else NOTHING


def _siblings(part: Part) -> SiblingHits | None:
    names = ("request_id", "sample_index", "num_cached_tokens")
    return part.requests.siblings.hits() if all(map(part.has_request, names)) else None


def _latency(part: Part, prefix: str) -> Distribution:
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
        return ratio((self._values.mean + self._call) * steps / 1e9, inside) if self._values else None


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
