"""The list of rules, and the diagnosis that they make."""

from __future__ import annotations

from collections.abc import Callable

from kvhook.analysis.diagnosis import batch, cache, prefix
from kvhook.analysis.diagnosis.finding import Finding
from kvhook.analysis.diagnosis.signs import Signs

#: What a run may suffer from, in the order in which it is told. Each gives a finding only if there is evidence.
RULES: tuple[Callable[[Signs], Finding | None], ...] = (
    cache.too_small,
    cache.preemption_thrash,
    cache.evicted_too_early,
    prefix.order,
    prefix.off,
    prefix.below_a_block,
    prefix.never_looked_up,
    prefix.useless,
    prefix.only_siblings,
    batch.prefill_holds_up_decode,
    batch.limited_by_seats,
    batch.limited_by_tokens,
    cache.mostly_empty,
)
#: The names of all findings.
NAMES = (
    "cache_too_small",
    "preemption_thrash",
    "evicted_too_early",
    "order_spoils_sharing",
    "prefix_cache_off",
    "shared_beginning_below_block",
    "never_looked_up",
    "prefix_cache_useless",
    "hits_only_from_siblings",
    "prefill_holds_up_decode",
    "limited_by_max_num_seqs",
    "limited_by_token_budget",
    "cache_mostly_empty",
)


def diagnose(signs: Signs) -> list[Finding]:
    """What a run suffers from; empty if nothing shows."""
    return [finding for rule in RULES if (finding := rule(signs)) is not None]
