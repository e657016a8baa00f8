"""The summary of the requests with one label.

What a step counts is of all requests in it, so that the numbers of single requests take the place of those of steps
where there are some.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np

from kvhook.analysis.distribution import NOTHING
from kvhook.analysis.summary import Summary
from kvhook.analysis.values import Values
from kvhook.records.columns import Table, floats, has

#: Why a number of a step is not told of a label.
OF_ALL = "a step counts it for all requests in it together, not for those of a label"
#: Numbers of steps that would be taken for numbers of the label.
_NOT_TOLD = (
    *("prefix_cache_queries", "prefix_cache_hits", "prefix_cache_preempted_queries", "prefix_cache_preempted_hits"),
    *("preempted_share_of_hits", "connector_prefix_cache_queries", "connector_prefix_cache_hits"),
    *("connector_prefix_cache_hit_rate", "combined_prefix_cache_hit_rate", "never_looked_up", "missed_by_vllm"),
    *("num_drafts", "num_draft_tokens", "num_accepted_tokens", "draft_acceptance_rate", "mean_acceptance_length"),
    *("mm_cache_queries", "mm_cache_hits", "mm_cache_hit_rate", "num_reqs_before", "num_added_reqs", "num_reqs_at_end"),
)


def of_label(summary: Summary, requests: Table) -> Summary:
    """Make the summary of the steps in which requests with a label were in the engine one of these requests.

    Args:
        summary: of these steps.
        requests: the requests with this label that finished.
    """
    prompt, generated, cached = (_sum(requests, f"num_{what}_tokens") for what in ("prompt", "generation", "cached"))
    tell = requests[requests["num_cached_tokens"] >= 0] if has(requests, "num_cached_tokens") else requests[:0]
    looked_up = _sum(tell, "num_prompt_tokens")
    told: dict[str, Any] = dict.fromkeys(_NOT_TOLD)
    told |= {
        "prefix_cache_hit_rate": cached / looked_up if cached is not None and looked_up else None,
        "prefix_cache_repeated_queries": 0,
        "num_prompt_tokens": prompt,
        "num_prompt_tokens_cached": cached,
        "num_prompt_tokens_computed": None if cached is None or looked_up is None else looked_up - cached,
        "num_generation_tokens": generated,
        "prompt_tokens_per_second": _rate(prompt, summary.time_in_steps),
        "generation_tokens_per_second": _rate(generated, summary.time_in_steps),
        "num_finished_reqs": len(requests),
        "finished_by_reason": dict(sorted(Counter(requests["finish_reason"].tolist()).items())),
        "num_aborted_reqs": int((requests["finish_reason"] == "abort").sum()),
        "num_preempted_reqs": _sum(requests, "num_preemptions"),
        "time_to_first_token": _describe(requests, "time_to_first_token"),
        "inter_token_latency": NOTHING,
        "accounts": [],
        "core": None,
        "not_recorded": {**summary.not_recorded, **dict.fromkeys((*_NOT_TOLD, "inter_token_latency"), OF_ALL)},
    }
    return dataclasses.replace(summary, **told)


def _sum(requests: Table, name: str) -> int | None:
    if not has(requests, name):
        return None
    known = requests[name][requests[name] >= 0]
    return int(known.sum()) if len(known) or not len(requests) else None


def _rate(tokens: int | None, seconds: float) -> float | None:
    return tokens / seconds if tokens is not None and seconds else None


def _describe(requests: Table, name: str) -> Any:
    values = floats(requests, name)
    values = values[~np.isnan(values)]
    if not len(values):
        return NOTHING
    taken = Values()
    taken.take(values)
    return taken.describe()
