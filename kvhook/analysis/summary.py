"""A run in numbers. `kvhook.text.summary` prints them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from kvhook.analysis.distribution import Distribution, distribution
from kvhook.records.columns import Table, floats, has, texts, total, with_stats
from kvhook.records.levels import NOT_COUNTED, level_codes, steps_by_level, tokens_are_known
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

    steps: int
    steps_without_stats: int
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

    #: KV blocks that can be used, of all engines together
    num_kv_blocks: int | None
    block_size: int | None
    kv_cache_usage_mean: float | None
    kv_cache_usage_p95: float | None
    kv_cache_usage_peak: float | None

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

    num_prompt_tokens: int | None
    num_prompt_tokens_computed: int | None
    num_prompt_tokens_cached: int | None
    num_generation_tokens: int | None
    prompt_tokens_per_second: float | None
    generation_tokens_per_second: float | None

    num_running_reqs_mean: float | None
    num_running_reqs_peak: int | None
    num_waiting_reqs_mean: float | None
    num_waiting_reqs_peak: int | None
    num_preempted_reqs: int | None
    num_finished_reqs: int | None
    finished_by_reason: dict[str, int]

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
    #: what failed inside kvhook, if anything did
    faults: dict[str, str]
    #: what to do if there are no steps
    why_no_steps: str

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


def summarize(records: Records, engine: int | None = None) -> Summary:
    """Reduce a run to its summary.

    Args:
        records: the run.
        engine: only this engine of it; all of them together otherwise.
    """
    with np.errstate(all="ignore"):  # numbers out of a damaged file may be anything
        return _summarize(records, engine)


def _summarize(records: Records, engine: int | None) -> Summary:
    steps, requests = records.steps(engine), records.requests(engine)
    meta = records.meta
    engines = [e for e in meta["engines"] if engine is None or e["engine"] == engine]
    known = with_stats(steps)
    # AsyncLLM has no step that could be timed: its records have one time each
    timed = ~np.isin(steps["engine"], [e["engine"] for e in engines if e.get("timed_steps") is False])
    seconds = (steps["t_end_ns"] - steps["t_start_ns"])[timed] / 1e9
    inside = float(seconds.sum())
    usage = floats(known, "kv_cache_usage")
    caching = [e.get("enable_prefix_caching") for e in engines]
    prefix_on = None if None in caching or not caching else any(caching)
    queries, hits = total(steps, "prefix_cache_queries"), total(steps, "prefix_cache_hits")
    again_queries = total(steps, "prefix_cache_preempted_queries")
    again = total(steps, "prefix_cache_preempted_hits")
    levels = steps_by_level(steps)
    counted: dict[str, int | None] = dict.fromkeys(COUNTED)
    if tokens_are_known(levels):
        counted = {name: total(steps, name) for name in COUNTED}
        counted["num_finished_reqs"] = _finished(steps, requests, levels)
    prompt, generated = counted["num_prompt_tokens"], counted["num_generation_tokens"]
    running, waiting = floats(known, "num_running_reqs"), floats(known, "num_waiting_reqs")
    reasons, reason_counts = np.unique(texts(requests, "finish_reason"), return_counts=True)
    cost = _cost(steps, "kvhook_ns", max((e.get("hook_call_ns") or 0 for e in engines), default=0))
    made = _cost(steps, "vllm_stats_ns", 0)
    blocks = [e["num_kv_blocks"] for e in engines if e.get("num_kv_blocks")]
    return Summary(
        vllm=str(meta["vllm"]),
        model=str(engines[0].get("model") or "") if engines else "",
        engines=len(engines),
        steps=len(steps),
        steps_without_stats=len(steps) - len(known),
        steps_by_level=levels,
        level_changes=[c for e in engines for c in _changes(e)],
        not_recorded=_not_recorded(levels, len(steps)),
        wall_time=float(steps["t_end_ns"].max() - steps["t_start_ns"].min()) / 1e9 if len(steps) else 0.0,
        time_in_steps=inside,
        step_time=distribution(seconds),
        num_kv_blocks=sum(blocks) if blocks else None,
        block_size=next((e["block_size"] for e in engines if e.get("block_size")), None),
        kv_cache_usage_mean=float(usage.mean()) if len(usage) else None,
        kv_cache_usage_p95=float(np.quantile(usage, 0.95)) if len(usage) else None,
        kv_cache_usage_peak=float(usage.max()) if len(usage) else None,
        prefix_caching=prefix_on,
        prefix_cache_queries=queries,
        prefix_cache_hits=hits,
        prefix_cache_hit_rate=_ratio(hits, queries),
        prefix_cache_preempted_queries=again_queries,
        prefix_cache_preempted_hits=again,
        preempted_share_of_hits=_ratio(again, None if again is None or hits is None else hits + again),
        num_prompt_tokens=prompt,
        num_prompt_tokens_computed=counted["num_prompt_tokens_computed"],
        num_prompt_tokens_cached=counted["num_prompt_tokens_cached"],
        num_generation_tokens=generated,
        prompt_tokens_per_second=_ratio(prompt, inside),
        generation_tokens_per_second=_ratio(generated, inside),
        num_running_reqs_mean=float(running.mean()) if len(running) else None,
        num_running_reqs_peak=int(running.max()) if len(running) else None,
        num_waiting_reqs_mean=float(waiting.mean()) if len(waiting) else None,
        num_waiting_reqs_peak=int(waiting.max()) if len(waiting) else None,
        num_preempted_reqs=counted["num_preempted_reqs"],
        num_finished_reqs=counted["num_finished_reqs"],
        finished_by_reason=dict(zip(reasons.tolist(), reason_counts.tolist(), strict=True)),
        time_to_first_token=distribution(*records.latencies("time_to_first_token", engine)),
        inter_token_latency=distribution(*records.latencies("inter_token_latency", engine)),
        mean_time_per_output_token=_time_per_output_token(requests),
        e2e_latency=distribution(floats(requests, "e2e_latency")),
        kvhook_ns_p50=float(np.median(cost)) if len(cost) else None,
        kvhook_ns_p99=float(np.quantile(cost, 0.99)) if len(cost) else None,
        kvhook_share=_ratio(float(cost.mean()) * int(timed.sum()) / 1e9 if len(cost) else None, inside),
        vllm_stats_ns_p50=float(np.median(made)) if len(made) else None,
        vllm_stats_share=_ratio(float(made.mean()) * _made_for_us(steps, engines) / 1e9, inside) if len(made) else None,
        # a damaged record is a gap in the numbers as well, unless it was the last
        records_lost=max(int(meta["records_lost"]), int(meta["damaged"])),
        records_dropped=int(meta["records_dropped"]),
        absent=dict(meta["absent"]),
        faults=dict(meta.get("faults", {})),
        why_no_steps=str(meta.get("why_no_steps", "")),
    )


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


def _not_recorded(levels: dict[str, int], steps: int) -> dict[str, str]:
    """Number of the summary -> why it is not known, or of which steps only, because of the level."""
    full = levels.get("full", 0)
    out = {}
    if full < steps:
        why = f"of {full:,} of {steps:,} steps only: the others are" if full else "this run is"
        out = dict.fromkeys(_ONLY_FULL, f"{why} recorded at level light, without single requests and their clocks")
    if not tokens_are_known(levels):
        sums = (*(c for c in COUNTED if c in _FIELDS), "prompt_tokens_per_second", "generation_tokens_per_second")
        out |= dict.fromkeys(sums, NOT_COUNTED)
    return out


def _finished(steps: Table, requests: Table, levels: dict[str, int]) -> int:
    """Finished requests: their records, or at level light their count."""
    return len(requests) if levels.keys() <= {"full"} else int(floats(steps, "num_finished_reqs").sum())


def _json_value(value: Any) -> Any:
    if isinstance(value, Distribution):
        return {f.name: _json_value(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, float) and math.isnan(value):
        return None
    return value
