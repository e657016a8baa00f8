"""How full the KV cache was: at the ends of the steps, and when they had been scheduled."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from kvhook.analysis.part import Part

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


def usage_of(part: Part) -> Usage:
    """Reduce the usage of steps; those without the scheduler's stats do not count."""
    steps = part.steps
    peak_in_step = steps.usage_peak_in_step if part.has("kv_cache_usage_peak") else None
    if not part.has("kv_cache_usage") or not steps.known:
        return Usage(peak_in_step=peak_in_step)
    used = steps.blocks_used if part.has("num_kv_blocks_used") else steps.usage_above_0
    prefilled = part.total("num_prompt_tokens") or part.total("prefix_cache_queries")
    ended = part.has("num_running_reqs") and not steps.ran
    if peak_in_step is None and prefilled and ended and not used:
        return Usage(not_seen=True)
    if steps.usage_unknown:
        return Usage(math.nan, math.nan, math.nan, peak_in_step)
    return Usage(steps.usage.mean, steps.usage.nth(0.95), steps.usage.largest, peak_in_step)
