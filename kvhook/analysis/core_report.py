"""What the engine cores' records say about the KV cache: where hits come from, what misses, evictions and preemptions
cost, what is wasted. Pure: arrays in, numbers out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvhook.core_schema import LIMITS, MISS_REASONS
from kvhook.records.columns import Table, has
from kvhook.records.core import CoreRecords

#: Shared prefixes that are told.
MOST_PREFIXES = 8


class Misses(NamedTuple):
    """Look-ups that ended for one reason, and the tokens in whole blocks that they did not find."""

    lookups: int
    tokens: int


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
    #: share of the evicted blocks whose content was computed again later: evicted too early
    evicted_too_early: float


@dataclass(frozen=True)
class CoreReport:
    """The engine cores' account of one run, all cores together. Shares are between 0 and 1; NaN where there is nothing
    to be a share of; None where this engine cannot tell."""

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
    num_preemptions: int
    num_lost_tokens: int
    preempted_seconds: float
    num_kv_blocks_peak: int
    num_kv_blocks_cached_mean: float
    num_kv_blocks_empty_mean: float
    #: share of the tokens' room in used blocks that holds no token
    waste: float | None
    blocks: BlockTimes | None
    records_lost: int
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
    """All numbers of a run.

    Args:
        cores: its engine cores.
        ledger: whether to read the ledger of blocks too, which may be long.
    """
    steps, lookups, preemptions, requests = cores.steps(), cores.lookups(), cores.preemptions(), cores.requests()
    facts = cores.facts[0] if cores.facts else {}
    size = int(facts.get("block_size") or 0)
    seen = lookups[lookups["miss_reason"] != "not_looked_up"]
    resumed = seen[seen["resumed"] == 1]
    evicted = lookups[lookups["miss_reason"] == "evicted"]
    return CoreReport(
        num_steps=len(steps),
        num_requests=len(requests),
        block_size=size,
        num_kv_blocks=int(facts.get("num_kv_blocks") or 0),
        bytes_per_block=facts.get("bytes_per_block"),
        num_scheduled_tokens=_sum(steps, "num_scheduled_tokens"),
        num_prefill_tokens=_sum(steps, "num_prefill_tokens"),
        num_recomputed_tokens=_sum(steps, "num_recomputed_tokens"),
        num_decode_tokens=_sum(steps, "num_decode_tokens"),
        num_spec_tokens=_sum(steps, "num_spec_tokens"),
        limited_by={why: n for why in LIMITS if (n := int((steps["limited_by"] == why).sum()))},
        num_lookups=len(seen),
        num_lookup_tokens=_sum(seen, "num_tokens"),
        num_found_tokens=_sum(seen, "num_found_tokens"),
        num_resumed_lookup_tokens=_sum(resumed, "num_tokens"),
        num_resumed_found_tokens=_sum(resumed, "num_found_tokens"),
        misses=_misses(lookups, size),
        num_evicted_blocks=_sum(steps, "num_kv_blocks_evicted"),
        num_lookups_of_evicted=len(evicted),
        evicted_steps_p50=_middle(evicted["evicted_steps"]),
        evicted_seconds_p50=_middle(evicted["evicted_ns"]) / 1e9,
        num_preemptions=len(preemptions),
        num_lost_tokens=_sum(preemptions, "num_lost_tokens"),
        preempted_seconds=_sum(requests, "preempted_ns") / 1e9,
        num_kv_blocks_peak=int(steps["num_kv_blocks_peak"].max(initial=0)),
        num_kv_blocks_cached_mean=_mean(steps["num_kv_blocks_cached"]),
        num_kv_blocks_empty_mean=_mean(steps["num_kv_blocks_empty"]),
        waste=_waste(steps, size),
        blocks=_block_times(cores.blocks(), size) if ledger else None,
        records_lost=cores.lost,
        failures=tuple(str(facts["failed"]) for facts in cores.facts if facts.get("failed")),
    )


def _misses(lookups: Table, size: int) -> dict[str, Misses]:
    found = {}
    for why in MISS_REASONS[1:]:
        rows = lookups[lookups["miss_reason"] == why]
        if len(rows):
            whole = (rows["num_tokens"] - 1) // size * size if size else rows["num_tokens"]
            found[why] = Misses(len(rows), int(np.maximum(whole - rows["num_found_tokens"], 0).sum()))
    return found


def _waste(steps: Table, size: int) -> float | None:
    if not has(steps, "num_kv_tokens") or not size:
        return None
    room = int(steps["num_kv_blocks_peak"].sum()) * size
    return 1 - int(steps["num_kv_tokens"].sum()) / room if room else float("nan")


def _block_times(events: Table, size: int) -> BlockTimes | None:
    """What the ledger tells; None without one. Events of one block follow each other in the order of the ledger."""
    if not len(events):
        return None
    lifetimes, idle, between, reuses = [], [], [], dict[int, int]()
    cached_at: dict[tuple[int, int], int] = {}
    free_at: dict[tuple[int, int], int] = {}
    hits: dict[tuple[int, int], int] = {}
    used_at: dict[int, int] = {}
    who: dict[int, set[int]] = {}
    length: dict[int, int] = {}
    gone: list[int] = []
    missed: set[int] = set()  # places in `gone`
    last_gone: dict[int, int] = {}
    names = ("core", "block", "event", "step", "digest", "request", "index")
    for core, block, event, step, digest, request, index in zip(*(events[n].tolist() for n in names), strict=True):
        key = (core, block)
        if event == "cache":
            cached_at[key], hits[key], length[digest] = step, 0, (index + 1) * size
            who.setdefault(digest, set()).add(request)
            used_at[digest] = step
            if digest in last_gone:
                missed.add(last_gone.pop(digest))
        elif event == "hit":
            hits[key] = hits.get(key, 0) + 1
            who.setdefault(digest, set()).add(request)
            if digest in used_at:
                between.append(step - used_at[digest])
            used_at[digest] = step
        elif event == "free":
            free_at[key] = step
        elif event in ("evict", "reset"):
            if key in cached_at:
                lifetimes.append(step - cached_at.pop(key))
                reuses[hits[key]] = reuses.get(hits[key], 0) + 1
                del hits[key]
            if event == "evict":
                last_gone[digest] = len(gone)
                gone.append(digest)
                if key in free_at:
                    idle.append(step - free_at[key])
    for count in hits.values():
        reuses[count] = reuses.get(count, 0) + 1
    return BlockTimes(
        lifetime=_percentiles(lifetimes),
        idle_before_eviction=_percentiles(idle),
        steps_between_uses=_percentiles(between),
        reuses=dict(sorted(reuses.items())),
        shared_prefixes=_shared(who, length),
        evicted_too_early=len(missed) / len(gone) if gone else float("nan"),
    )


def _shared(who: Mapping[int, set[int]], length: Mapping[int, int]) -> tuple[SharedPrefix, ...]:
    """The longest prefix of each set of requests that have one in common, those first that save most."""
    longest: dict[frozenset[int], int] = {}
    for digest, requests in who.items():
        together = frozenset(requests)
        if len(together) > 1 and length.get(digest, 0) > length.get(longest.get(together, 0), 0):
            longest[together] = digest
    found = [SharedPrefix(digest, length[digest], len(requests)) for requests, digest in longest.items()]
    found.sort(key=lambda p: (p.num_tokens * (p.num_requests - 1), p.digest), reverse=True)
    return tuple(found[:MOST_PREFIXES])


def _sum(table: Table, name: str) -> int:
    return int(table[name].sum())


def _mean(values: npt.NDArray[np.int64]) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _middle(values: npt.NDArray[np.int64]) -> float:
    known = values[values >= 0]
    return float(np.median(known)) if len(known) else float("nan")


def _percentiles(values: list[int]) -> tuple[float, float, float]:
    if not values:
        return (float("nan"),) * 3
    low, middle, high = np.percentile(values, (50, 90, 99)).tolist()
    return low, middle, high
