"""What the engine cores' records say about the KV cache: where hits come from, what misses, evictions and preemptions
cost, what is wasted. Pure: arrays in, numbers out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvhook.analysis.core_signs import CoreSigns
from kvhook.analysis.core_totals import CoreTotals
from kvhook.analysis.values import Values
from kvhook.core_schema import LIMITS, MISS_REASONS
from kvhook.records.block_lives import block_lives, prefixes, steps_between_uses
from kvhook.records.columns import Table
from kvhook.records.core import CoreRecords

#: Shared prefixes that are told.
MOST_PREFIXES = 8


class Misses(NamedTuple):
    """Look-ups that ended for one reason, and the tokens in whole blocks that they did not find."""

    lookups: int
    tokens: int


class Cost(NamedTuple):
    """Work that was done twice: tokens, their share of all scheduled tokens (NaN without any), and the time that the
    engine core's steps took for them, shared out by tokens."""

    tokens: int
    share: float
    seconds: float


class EvictionCost(NamedTuple):
    """What evictions cost, as look-ups tell it.

    Args:
        blocks: evicted blocks that a look-up asked for again: evicted too early. One that several requests asked for
            before it was cached again counts for each.
        share: their share of all evicted blocks, at most 1; NaN if none was evicted.
        again: tokens that new requests had to compute because what held them had been evicted. Those of requests that
            had been preempted are in the cost of preemptions.
    """

    blocks: int
    share: float
    again: Cost


class SharedPrefix(NamedTuple):
    """A prefix that several requests have in common: a digest of it, its length, and how many requests."""

    digest: int
    num_tokens: int
    num_requests: int


@dataclass(frozen=True)
class BlockTimes:
    """From the ledger of blocks, in steps; percentiles are (50, 90, 99)."""

    lifetime: tuple[float, float, float]
    idle_before_eviction: tuple[float, float, float]
    steps_between_uses: tuple[float, float, float]
    #: hits of a cached block until it was evicted (or the end) -> how many blocks
    reuses: Mapping[int, int]
    shared_prefixes: tuple[SharedPrefix, ...]
    #: evicted contents, those of them that were needed again later (evicted too early), and the share of these
    num_evicted: int
    num_evicted_too_early: int
    evicted_too_early: float


@dataclass(frozen=True)
class CoreReport:
    """The engine cores' account of one run, all cores together. Shares are between 0 and 1; NaN where there is nothing
    to be a share of; None where this engine cannot tell. The size and the number of blocks are those of each core; 0
    where they differ."""

    num_cores: int
    num_steps: int
    num_requests: int
    block_size: int
    num_kv_blocks: int
    bytes_per_block: int | None
    num_scheduled_tokens: int
    num_prefill_tokens: int
    num_recomputed_tokens: int
    num_decode_tokens: int
    num_spec_tokens: int
    #: why no more was scheduled -> steps
    limited_by: Mapping[str, int]
    num_lookups: int
    num_lookup_tokens: int
    num_found_tokens: int
    #: those of requests that were scheduled again after a preemption
    num_resumed_lookup_tokens: int
    num_resumed_found_tokens: int
    misses: Mapping[str, Misses]
    num_evicted_blocks: int
    #: look-ups that stopped at a block that had been evicted
    num_lookups_of_evicted: int
    #: steps and seconds between an eviction and the look-up that missed it, in the middle
    evicted_steps_p50: float
    evicted_seconds_p50: float
    evictions: EvictionCost | None
    num_preemptions: int
    num_lost_tokens: int
    preempted_seconds: float
    preemptions: Cost
    num_kv_blocks_peak: int
    num_kv_blocks_cached_mean: float
    num_kv_blocks_empty_mean: float
    #: share of the tokens' room in used blocks that holds no token
    waste: float | None
    blocks: BlockTimes | None
    records_lost: int
    #: what a diagnosis looks at
    signs: CoreSigns
    #: why the recording of a core ended early, where it did
    failures: tuple[str, ...] = ()

    def usage_peak(self, engines: Sequence[Mapping[str, Any]]) -> float | None:
        """The peak as a share of the same blocks as vLLM's own usage, so that both can be compared.

        Args:
            engines: facts about the engines of the run, of which there must be one.
        """
        if len(engines) != 1 or not self.num_kv_blocks:
            return None
        of, reserved = (engines[0].get(f"kv_usage_{what}") for what in ("of", "reserved"))
        return (self.num_kv_blocks_peak + (reserved or 0)) / (of or self.num_kv_blocks)


def report(cores: CoreRecords, *, ledger: bool = True) -> CoreReport:
    """All numbers of a run: one pass over its records.

    Args:
        cores: its engine cores.
        ledger: whether to read the ledger of blocks too, which may be long.
    """
    totals = CoreTotals()
    with np.errstate(all="ignore"):  # numbers out of a damaged file may be anything
        cores.go_over(totals.take)
        return report_of(totals, cores.facts, cores.lost, _block_times(cores) if ledger else None)


def report_of(
    totals: CoreTotals, cores: Sequence[Mapping[str, Any]], lost: int, blocks: BlockTimes | None = None
) -> CoreReport:
    """The same of cores that have been added up.

    Args:
        totals: of their records.
        cores: facts about each.
        lost: records that are not there.
        blocks: what their ledgers tell.
    """
    size, steps, sums = int(_same(cores, "block_size") or 0), totals.steps, totals.sums
    cached, empty = (_ratio(sums[f"num_kv_blocks_{what}"], steps) for what in ("cached", "empty"))
    return CoreReport(
        num_cores=len(cores),
        num_steps=steps,
        num_requests=totals.requests,
        block_size=size,
        num_kv_blocks=int(_same(cores, "num_kv_blocks") or 0),
        bytes_per_block=_same(cores, "bytes_per_block"),
        num_scheduled_tokens=sums["num_scheduled_tokens"],
        num_prefill_tokens=sums["num_prefill_tokens"],
        num_recomputed_tokens=sums["num_recomputed_tokens"],
        num_decode_tokens=sums["num_decode_tokens"],
        num_spec_tokens=sums["num_spec_tokens"],
        limited_by={why: n for code, why in enumerate(LIMITS) if (n := totals.limits[code])},
        num_lookups=totals.seen[0],
        num_lookup_tokens=totals.seen[1],
        num_found_tokens=totals.seen[2],
        num_resumed_lookup_tokens=totals.resumed[1],
        num_resumed_found_tokens=totals.resumed[2],
        misses={
            why: Misses(n, totals.missed_tokens[code])
            for code, why in enumerate(MISS_REASONS)
            if (n := totals.missed_lookups[code])
        },
        num_evicted_blocks=sums["num_kv_blocks_evicted"],
        num_lookups_of_evicted=totals.missed_lookups[MISS_REASONS.index("evicted")],
        evicted_steps_p50=_middle(totals.evicted_steps),
        evicted_seconds_p50=_middle(totals.evicted_ns) / 1e9,
        evictions=_evictions(totals, size),
        num_preemptions=totals.preemptions,
        num_lost_tokens=totals.lost_tokens,
        preempted_seconds=totals.preempted_ns / 1e9,
        preemptions=_cost(totals, sums["num_recomputed_tokens"], ("num_recomputed_tokens",)),
        num_kv_blocks_peak=totals.peak,
        num_kv_blocks_cached_mean=cached,
        num_kv_blocks_empty_mean=empty,
        waste=_waste(sums, size, cores),
        blocks=blocks,
        records_lost=lost,
        signs=totals.signs.signs(),
        failures=tuple(str(facts["failed"]) for facts in cores if facts.get("failed")),
    )


def _cost(totals: CoreTotals, tokens: int, of_kinds: tuple[str, ...]) -> Cost:
    """What so many tokens cost, at the mean price of tokens of these kinds."""
    done = sum(totals.sums[kind] for kind in of_kinds)
    price = sum(totals.seconds[kind].value for kind in of_kinds) / done if done else 0.0
    return Cost(tokens, _ratio(tokens, totals.sums["num_scheduled_tokens"]), tokens * price)


def _evictions(totals: CoreTotals, size: int) -> EvictionCost | None:
    """None of a trace from before this was recorded, or without a block size."""
    if not size or totals.evicted_untold:
        return None
    blocks, evicted = totals.evicted_tokens // size, totals.sums["num_kv_blocks_evicted"]
    share = min(blocks / evicted, 1.0) if evicted else math.nan
    new = totals.evicted_tokens_of_new
    return EvictionCost(blocks, share, _cost(totals, new, ("num_prefill_tokens", "num_recomputed_tokens")))


def _waste(sums: Mapping[str, int], size: int, cores: Sequence[Mapping[str, Any]]) -> float | None:
    if not size or any("num_kv_tokens" in facts.get("absent", {}).get("core_step", {}) for facts in cores):
        return None
    return 1 - _ratio(sums["num_kv_tokens"], sums["num_kv_blocks_peak"] * size)


def _block_times(cores: CoreRecords) -> BlockTimes | None:
    """What the ledger tells; None without one."""
    events = cores.blocks()
    if not len(events):
        return None
    lives = block_lives(events)
    evicted = lives[lives["evicted_step"] >= 0]
    aged, idle = evicted[evicted["cached_step"] >= 0], evicted[evicted["freed_step"] >= 0]
    times, blocks = np.unique(lives["num_hits"][lives["cached_step"] >= 0], return_counts=True)
    return BlockTimes(
        lifetime=_percentiles(aged["evicted_step"] - aged["cached_step"]),
        idle_before_eviction=_percentiles(idle["evicted_step"] - idle["freed_step"]),
        steps_between_uses=_percentiles(steps_between_uses(events)),
        reuses=dict(zip(times.tolist(), blocks.tolist(), strict=True)),
        shared_prefixes=_shared(prefixes(events, cores.block_sizes())),
        num_evicted=len(evicted),
        num_evicted_too_early=int((evicted["asked_again_step"] >= 0).sum()),
        evicted_too_early=_ratio(int((evicted["asked_again_step"] >= 0).sum()), len(evicted)),
    )


def _shared(tree: Table) -> tuple[SharedPrefix, ...]:
    """The longest prefixes that requests have in common, those first that save most."""
    tree = tree[(tree["num_requests"] > 1) & (tree["num_tokens"] > 0)]
    # where a longer prefix is shared by as many requests, they are the same requests
    of = {(int(p["group"]), int(p["digest"])): int(p["num_requests"]) for p in tree}
    longer = {(int(p["group"]), int(p["parent"])) for p in tree if of.get(_parent(p)) == p["num_requests"]}
    longest: dict[int, SharedPrefix] = {}
    for prefix in tree:
        digest = int(prefix["digest"])
        if (int(prefix["group"]), digest) not in longer:
            found = SharedPrefix(digest, int(prefix["num_tokens"]), int(prefix["num_requests"]))
            longest[digest] = max(found, longest.get(digest, found))  # several groups have the same one
    saves = sorted(longest.values(), key=lambda p: (p.num_tokens * (p.num_requests - 1), p.digest), reverse=True)
    return tuple(saves[:MOST_PREFIXES])


def _parent(prefix: Any) -> tuple[int, int]:
    return int(prefix["group"]), int(prefix["parent"])


def _same(cores: Sequence[Mapping[str, Any]], fact: str) -> Any:
    """What all cores say; None where they differ."""
    said = [facts.get(fact) for facts in cores]
    return said[0] if said and said.count(said[0]) == len(said) else None


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _middle(values: Values) -> float:
    middle = values.median()
    return math.nan if middle is None else middle


def _percentiles(values: npt.NDArray[np.int64]) -> tuple[float, float, float]:
    if not len(values):
        return (float("nan"),) * 3
    low, middle, high = np.percentile(values, (50, 90, 99)).tolist()
    return low, middle, high
