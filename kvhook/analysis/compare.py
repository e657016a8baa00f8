"""Several runs side by side: the same numbers of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvhook.analysis.summary import Summary

Value = float | str | None


class Row(NamedTuple):
    """One number of every run.

    Args:
        name: what it is.
        unit: "count", "s" (seconds), "share" (0 to 1), "name" (of a model) or "" (other text).
        values: one per run; None for what is not known. A word may stand in the place of a number: "off".
    """

    name: str
    unit: str
    values: tuple[Value, ...]


#: What is compared: name, unit, and how it is read from a summary.
ROWS: tuple[tuple[str, str, Callable[[Summary], Value]], ...] = (
    ("vLLM", "", lambda s: s.vllm),
    ("model", "name", lambda s: s.model),
    ("steps", "count", lambda s: s.steps),
    ("level", "", lambda s: "/".join(s.steps_by_level)),
    ("time in steps", "s", lambda s: s.time_in_steps),
    ("step time p50", "s", lambda s: s.step_time.p50),
    ("step time p99", "s", lambda s: s.step_time.p99),
    ("KV blocks", "count", lambda s: s.num_kv_blocks),
    ("KV usage peak", "share", lambda s: s.kv_cache_usage_peak),
    ("KV usage mean", "share", lambda s: s.kv_cache_usage_mean),
    ("prefix cache hit rate", "share", lambda s: "off" if s.prefix_caching is False else s.prefix_cache_hit_rate),
    ("prefix cache hit tokens", "count", lambda s: s.prefix_cache_hits),
    ("prompt tokens", "count", lambda s: s.num_prompt_tokens),
    ("prompt tokens computed", "count", lambda s: s.num_prompt_tokens_computed),
    ("generated tokens", "count", lambda s: s.num_generation_tokens),
    ("generated per s in steps", "count", lambda s: s.generation_tokens_per_second),
    ("running peak", "count", lambda s: s.num_running_reqs_peak),
    ("waiting peak", "count", lambda s: s.num_waiting_reqs_peak),
    ("preemptions", "count", lambda s: s.num_preempted_reqs),
    ("finished requests", "count", lambda s: s.num_finished_reqs),
    ("time to first token p50", "s", lambda s: s.time_to_first_token.p50),
    ("inter-token latency p50", "s", lambda s: s.inter_token_latency.p50),
    ("end to end p50", "s", lambda s: s.e2e_latency.p50),
    ("records lost", "count", lambda s: s.records_lost),
)


def compare(summaries: Sequence[Summary]) -> list[Row]:
    """The same numbers of several runs.

    Args:
        summaries: the runs.
    """
    return [Row(name, unit, tuple(read(s) for s in summaries)) for name, unit, read in ROWS]
