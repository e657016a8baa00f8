"""What the engine cores' records say about the KV cache: where hits come from, what misses, evictions and preemptions
cost, what is wasted. Pure: arrays in, numbers out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvhook.core_schema import LIMITS, MISS_REASONS
from kvhook.records.block_lives import block_lives, prefixes, steps_between_uses
from kvhook.records.columns import Table, has
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
    work = _Work(steps)
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
        evictions=_evictions(lookups, _sum(steps, "num_kv_blocks_evicted"), size, work),
        num_preemptions=len(preemptions),
        num_lost_tokens=_sum(preemptions, "num_lost_tokens"),
        preempted_seconds=_sum(requests, "preempted_ns") / 1e9,
        preemptions=work.cost(_sum(steps, "num_recomputed_tokens"), ("num_recomputed_tokens",)),
        num_kv_blocks_peak=int(steps["num_kv_blocks_peak"].max(initial=0)),
        num_kv_blocks_cached_mean=_mean(steps["num_kv_blocks_cached"]),
        num_kv_blocks_empty_mean=_mean(steps["num_kv_blocks_empty"]),
        waste=_waste(steps, size),
        blocks=_block_times(cores) if ledger else None,
        records_lost=cores.lost,
        failures=tuple(str(facts["failed"]) for facts in cores.facts if facts.get("failed")),
    )


class _Work:
    """How long the engine core's steps took, shared out among the tokens that each computed."""

    def __init__(self, steps: Table) -> None:
        self._steps = steps
        # with asynchronous scheduling a step begins before the one before it has ended
        begin = steps["t_schedule_ns"].copy()
        same = steps["core"][1:] == steps["core"][:-1]
        begin[1:] = np.where(same, np.maximum(begin[1:], steps["t_end_ns"][:-1]), begin[1:])
        took = np.maximum(steps["t_end_ns"] - begin, 0)
        self._each = took / 1e9 / np.maximum(steps["num_scheduled_tokens"], 1)

    def cost(self, tokens: int, of_kinds: tuple[str, ...]) -> Cost:
        """What so many tokens cost, at the mean price of tokens of these kinds."""
        done = np.sum([self._steps[kind] for kind in of_kinds], axis=0)
        price = float((self._each * done).sum()) / int(done.sum()) if done.any() else 0.0
        total = _sum(self._steps, "num_scheduled_tokens")
        return Cost(tokens, tokens / total if total else float("nan"), tokens * price)


def _evictions(lookups: Table, evicted: int, size: int, work: _Work) -> EvictionCost | None:
    """None of a trace from before this was recorded, or without a block size."""
    asked = lookups["num_evicted_tokens"]
    if not size or (asked < 0).any():
        return None
    blocks = int(asked.sum()) // size
    share = min(blocks / evicted, 1.0) if evicted else float("nan")
    new = int(asked[lookups["resumed"] == 0].sum())
    return EvictionCost(blocks, share, work.cost(new, ("num_prefill_tokens", "num_recomputed_tokens")))


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
        evicted_too_early=_mean(evicted["asked_again_step"] >= 0),
    )


def _shared(tree: Table) -> tuple[SharedPrefix, ...]:
    """The longest prefixes that requests have in common, those first that save most."""
    tree = tree[tree["num_requests"] > 1]
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


def _sum(table: Table, name: str) -> int:
    return int(table[name].sum())


def _mean(values: npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _middle(values: npt.NDArray[np.int64]) -> float:
    known = values[values >= 0]
    return float(np.median(known)) if len(known) else float("nan")


def _percentiles(values: npt.NDArray[np.int64]) -> tuple[float, float, float]:
    if not len(values):
        return (float("nan"),) * 3
    low, middle, high = np.percentile(values, (50, 90, 99)).tolist()
    return low, middle, high
