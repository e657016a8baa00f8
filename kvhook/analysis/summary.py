"""A run in numbers. `kvhook.analysis.summarize` makes them, `kvhook.text.summary` prints them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

from kvhook.analysis.accounts import Account
from kvhook.analysis.core_report import CoreReport
from kvhook.analysis.diagnosis.finding import Finding
from kvhook.analysis.distribution import Distribution
from kvhook.analysis.engine_events import EventTotal
from kvhook.analysis.lives import EngineLife
from kvhook.analysis.lookups import Missed, NotLookedUp
from kvhook.analysis.prompt_groups import PromptGroups
from kvhook.analysis.siblings import SiblingHits


class LeftOut(NamedTuple):
    """Steps that a summary leaves out because they are warm-up, and the scopes that say so."""

    steps: int
    scopes: tuple[str, ...]


class GroupRate(NamedTuple):
    """What the requests of one group (a label, a LoRA adapter) got from the caches. Sums of tokens are of the requests
    that tell them; ``hit_rate`` is None where none does."""

    name: str
    requests: int
    num_prompt_tokens: int
    num_cached_tokens: int | None
    num_generation_tokens: int
    hit_rate: float | None


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
    #: requests that were in the queue before the first step, were added since, and are in the queue after the last one,
    #: without those that a stop string ended in the front end while the scheduler's last stats counted them still
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
    #: which part of a run this is, "" if it is all of it
    part: str = ""
    #: that the process was killed, and what became of its last records; "" if the run was closed
    not_closed: str = ""
    #: what was left out because it is warm-up; None if nothing was
    left_out: LeftOut | None = None
    #: engines that are left out because they did the work of others once more: ranks that an external launcher started
    replicas: int = 0
    #: the requests by their labels and by their LoRA adapters, those with the most prompt tokens first; empty where no
    #: request has one
    by_label: list[GroupRate] = dataclasses.field(default_factory=list)
    by_lora_name: list[GroupRate] = dataclasses.field(default_factory=list)
    #: how much further the time since 1970 went in the run than the monotonic clock, in nanoseconds
    clock_drift_ns: int = 0
    #: the prompts with several samples (n > 1) and their hit rates; None if there are none
    by_prompt: PromptGroups | None = None
    #: what was done to the engines between steps, by kind: sleep, new weights, an emptied cache, LoRA adapters
    engine_events: list[EventTotal] = dataclasses.field(default_factory=list)
    #: what the run suffers from, each with its evidence and the setting that acts on it; empty if nothing shows
    findings: list[Finding] = dataclasses.field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain dictionaries, numbers and None: what ``json.dumps`` takes. NaN becomes None."""
        return {f.name: _json_value(getattr(self, f.name)) for f in dataclasses.fields(self)}


def _json_value(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _json_value(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        if hasattr(value, "_asdict"):
            return {name: _json_value(one) for name, one in value._asdict().items()}
        return [_json_value(one) for one in value]
    if isinstance(value, list):
        return [_json_value(one) for one in value]
    if isinstance(value, float) and math.isnan(value):
        return None
    return value
