"""How full the KV cache was: at the ends of the steps, and when they had been scheduled."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvhook.records.columns import Table, floats, has, total, with_stats

#: Usage inside a step is seen only where the scheduler is in the same process.
NOT_SEEN = "every request gave its blocks back before its step ended"


class Usage(NamedTuple):
    """Shares of the KV cache. None for what is not known.

    Args:
        mean: over the ends of the steps.
        p95: of the ends of the steps.
        peak: at the end of a step.
        peak_in_step: when a step had been scheduled, before finished requests gave their blocks back.
        not_seen: blocks were used, but never at the end of a step; then nothing of this is known.
    """

    mean: float | None = None
    p95: float | None = None
    peak: float | None = None
    peak_in_step: float | None = None
    not_seen: bool = False


def usage_of(steps: Table) -> Usage:
    """Reduce the usage of steps; those without the scheduler's stats do not count."""
    known = with_stats(steps)
    usage, inside = floats(known, "kv_cache_usage"), floats(known, "kv_cache_usage_peak")
    inside = inside[~np.isnan(inside)]
    peak_in_step = float(inside.max()) if len(inside) else None
    if not len(usage):
        return Usage(peak_in_step=peak_in_step)
    used = known["num_kv_blocks_used"] if has(known, "num_kv_blocks_used") else usage
    prefilled = total(steps, "num_prompt_tokens") or total(steps, "prefix_cache_queries")
    ended = has(known, "num_running_reqs") and not known["num_running_reqs"].any()
    if peak_in_step is None and prefilled and ended and not used.any():
        return Usage(not_seen=True)
    return Usage(float(usage.mean()), float(np.quantile(usage, 0.95)), float(usage.max()), peak_in_step)
