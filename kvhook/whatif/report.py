"""What other caches would have done with a run: one pure function that puts all calculations together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from kvhook.records.columns import Table
from kvhook.whatif.distances import Curve, lru_curve
from kvhook.whatif.fleet import FleetSize, fleet
from kvhook.whatif.optimum import optimum
from kvhook.whatif.replay import Replayed, Rules, replay
from kvhook.whatif.requests import BlockRequests

#: With more blocks than this in all requests, sizes that nobody asked for are told by the LRU curve alone.
REPLAY_UP_TO = 2_000_000
#: The optimum is computed up to so many blocks in all requests.
OPTIMUM_UP_TO = 20_000_000
#: Sizes that are told if none are asked for.
NUM_SIZES = 12
#: A cache is large enough if it finds this share of what an endless one finds.
ENOUGH = 0.99

_NOT_REPLAYED = "computed as a plain LRU cache: the run is too long to be played again"
_IMPORTED = "there was no engine: computed as a plain LRU cache that requests go through one after the other"


@dataclass(frozen=True)
class Run:
    """The run itself, as far as it is known.

    Attributes:
        blocks: KV blocks that could be used; 0 if there was no engine.
        bytes_per_block: of one KV block on one device; None if not known.
        rules: how the engine scheduled.
        prefill_tokens_per_second: how fast it computed prompts; None if not known.
        num_preemptions: how often requests were preempted.
        num_recomputed_tokens: tokens computed once more after preemptions.
        why_estimated: why another cache can only be estimated; empty if it can be told exactly.
        name: of the trace.
    """

    blocks: int = 0
    bytes_per_block: int | None = None
    rules: Rules | None = None
    prefill_tokens_per_second: float | None = None
    num_preemptions: int = 0
    num_recomputed_tokens: int = 0
    why_estimated: tuple[str, ...] = ()
    name: str = ""


@dataclass(frozen=True)
class Size:
    """One size of the cache.

    Attributes:
        blocks: that can be used, the null block not counted.
        tokens: that fit in.
        bytes: that it takes on one device; None if not known.
        hit_tokens: found by requests when they were first admitted.
        query_tokens: looked up by them.
        exact: whether a real engine finds exactly as many.
        why_estimated: why it might not.
        lru_hit_tokens: what a plain LRU cache of this size finds, which holds nothing but full blocks.
        lru_error: standard error of that, in tokens; 0 if it is exact.
        num_preemptions: how often requests would be preempted; None if that was not played.
        num_recomputed_tokens: what would be computed again for it.
        seconds_saved: prefill time saved against the run as it was, less if negative; None if not known.
    """

    blocks: int
    tokens: int
    bytes: int | None
    hit_tokens: int
    query_tokens: int
    exact: bool
    why_estimated: tuple[str, ...]
    lru_hit_tokens: int
    lru_error: float
    num_preemptions: int | None
    num_recomputed_tokens: int | None
    seconds_saved: float | None

    @property
    def hit_rate(self) -> float:
        """Share of the looked-up tokens that was found; NaN if none were."""
        return self.hit_tokens / self.query_tokens if self.query_tokens else float("nan")


@dataclass(frozen=True)
class Losses:
    """Tokens that an ideal cache finds and this run did not; None where it is not known.

    Attributes:
        evictions: they had been evicted.
        running_together: they were being computed at the same time, by a request that had come before.
        order: of the evicted ones, what the longest-prefix-first order would have found; negative if it finds less.
        preemptions: computed again after preemptions. Look-ups do not count them.
        block_size: at most so many belong to blocks that agree in part; half as many is what to expect.
    """

    evictions: int | None
    running_together: int | None
    order: int | None
    preemptions: int
    block_size: int


@dataclass(frozen=True)
class WhatIf:
    """Everything that is told of a run.

    Attributes:
        hit_tokens: found in the run itself by requests when they were first admitted; None if it was not recorded.
        ceiling_hit_tokens: found by a cache that holds everything as soon as it has been asked for once.
        endless_hit_tokens: found by this engine with a cache that never evicts; None if that was not played.
        optimum_hit_tokens: found at most at the run's size, whatever is evicted; None if not known.
        reproduced: whether the replay at the run's own size found for each request what the engine found; None if it
            was not played.
        enough: the smallest size that finds `ENOUGH` of what an endless cache finds.
        reordered: the same sizes with the requests in longest-prefix-first order, if that was asked for.
        longer_blocks: block size -> tokens found by an endless cache with blocks of that size.
        curve: sizes and tokens that a plain LRU cache finds, for a plot.
    """

    name: str
    block_size: int
    blocks: int
    bytes_per_block: int | None
    num_requests: int
    query_tokens: int
    hit_tokens: int | None
    ceiling_hit_tokens: int
    endless_hit_tokens: int | None
    optimum_hit_tokens: int | None
    reproduced: bool | None
    why_estimated: tuple[str, ...]
    prefill_tokens_per_second: float | None
    losses: Losses
    sizes: tuple[Size, ...]
    enough: Size | None
    reordered: tuple[Size, ...] = ()
    longer_blocks: dict[int, int] = field(default_factory=dict)
    fleet: tuple[FleetSize, ...] = ()
    curve: tuple[tuple[int, int], ...] = ()
    rules: Rules | None = None


def what_if(
    requests: BlockRequests,
    run: Run,
    *,
    blocks: Sequence[int] = (),
    reorder: bool = False,
    replicas: Sequence[int] = (),
) -> WhatIf:
    """What other caches would have done.

    Args:
        requests: of the run.
        run: what else is known of it.
        blocks: the sizes to tell; some between the longest request and everything if none are given.
        reorder: whether to tell the sizes in longest-prefix-first order too.
        replicas: numbers of engines to spread the requests over.
    """
    return _Study(requests, run).tell(blocks, reorder=reorder, replicas=replicas)


class _Study:
    """One run, and what has been computed of it."""

    def __init__(self, requests: BlockRequests, run: Run) -> None:
        self.requests, self.run = requests, run
        self.curve = lru_curve(requests)
        self.enough_for_all = _enough_for_all(requests, run.rules)
        self.small = run.rules is not None and len(requests.ids) <= REPLAY_UP_TO
        known = requests.found >= 0
        self.measured = int(requests.found[requests.looked_up].sum()) if len(requests) and known.all() else None
        self.here = self._play(run.blocks) if self.small and run.blocks else None
        self.endless = self._play(_everything(requests)) if self.small else None
        self.reproduced: bool | None = None
        self.reasons = run.why_estimated if run.rules is not None else (_IMPORTED,)
        if self.here is not None and self.measured is not None:
            differs = int((self.here.found != requests.found)[requests.looked_up].sum())
            self.reproduced = not differs
            if differs:
                self.reasons += (
                    f"played again, {differs:,} of {len(requests):,} requests find more or less than they did",
                )

    def tell(self, blocks: Sequence[int], *, reorder: bool, replicas: Sequence[int]) -> WhatIf:
        requests, run, size = self.requests, self.run, self.requests.block_size
        sizes = list(blocks) or self._some_sizes()
        best = optimum(requests, run.blocks) * size if run.blocks and len(requests.ids) <= OPTIMUM_UP_TO else None
        ordered = requests.reordered(across=run.rules is None) if reorder or self.small else None
        study = (
            _Study(ordered, replace(run, blocks=0, why_estimated=self.reasons))
            if reorder and ordered is not None
            else None
        )
        return WhatIf(
            name=run.name,
            block_size=size,
            blocks=run.blocks,
            bytes_per_block=run.bytes_per_block,
            num_requests=len(requests),
            query_tokens=requests.query_tokens,
            hit_tokens=self.measured,
            ceiling_hit_tokens=round(self.curve.ceiling) * size,
            endless_hit_tokens=self.endless.num_found_tokens if self.endless else None,
            optimum_hit_tokens=best,
            reproduced=self.reproduced,
            why_estimated=self.reasons,
            prefill_tokens_per_second=run.prefill_tokens_per_second,
            losses=self._losses(ordered),
            sizes=tuple(self.size(n, asked=bool(blocks)) for n in sizes),
            enough=self._enough(),
            reordered=tuple(study.size(n, asked=bool(blocks)) for n in sizes) if study else (),
            longer_blocks=self._longer_blocks(),
            fleet=tuple(fleet(requests, run.blocks or self._lru_enough(), replicas)) if replicas else (),
            curve=_points(self.curve, size),
            rules=run.rules,
        )

    def size(self, blocks: int, *, asked: bool = False) -> Size:
        """One size of the cache; one that is asked for is played again also if that takes long."""
        requests, run, size = self.requests, self.run, self.requests.block_size
        lru = round(self.curve.at(blocks)) * size
        played = self._play(blocks) if self.small or (asked and run.rules is not None) else None
        if played is None:
            reasons = self.reasons if run.rules is None else (*self.reasons, _NOT_REPLAYED)
            hits = lru
        else:
            reasons, hits = self.reasons, played.num_found_tokens
            if played.num_preemptions:
                reasons += (f"requests are preempted ({played.num_preemptions:,} times)",)
            if played.stuck:
                reasons += (f"{played.stuck:,} requests find no room at all",)
        if self.curve.rate < 1:
            reasons += (f"{100 * self.curve.rate:.2g} % of the blocks were looked at",)
        was = self.measured if self.measured is not None else 0
        saved = hits - was
        if played is not None:
            saved += run.num_recomputed_tokens - played.num_recomputed_tokens
        speed = run.prefill_tokens_per_second
        return Size(
            blocks=blocks,
            tokens=blocks * size,
            bytes=blocks * run.bytes_per_block if run.bytes_per_block else None,
            hit_tokens=hits,
            query_tokens=requests.query_tokens,
            exact=not reasons,
            why_estimated=tuple(reasons),
            lru_hit_tokens=lru,
            lru_error=self.curve.error(blocks) * size,
            num_preemptions=played.num_preemptions if played else None,
            num_recomputed_tokens=played.num_recomputed_tokens if played else None,
            seconds_saved=saved / speed if speed else None,
        )

    def _play(self, blocks: int) -> Replayed:
        assert self.run.rules is not None
        return replay(self.requests, min(blocks, self.enough_for_all), self.run.rules)

    def _losses(self, ordered: BlockRequests | None) -> Losses:
        requests, size = self.requests, self.requests.block_size
        ceiling = round(self.curve.ceiling) * size
        found = self.measured if self.measured is not None else self.here.num_found_tokens if self.here else None
        evictions = together = order = None
        if self.endless is not None:
            together = ceiling - self.endless.num_found_tokens
            if found is not None:
                evictions = self.endless.num_found_tokens - found
        elif found is not None:
            evictions = ceiling - found
        if self.here is not None and self.run.rules is not None and ordered is not None:
            order = replay(ordered, self.run.blocks, self.run.rules).num_found_tokens - self.here.num_found_tokens
        return Losses(evictions, together, order, self.run.num_recomputed_tokens, _in_part(requests))

    def _some_sizes(self) -> list[int]:
        """From the longest request to a cache that evicts nothing, and the run's own."""
        least = max(self.requests.longest, 1)
        most = max(self.endless.peak if self.endless else 0, self.requests.num_distinct, least + 1, self.run.blocks)
        steps = np.unique(np.geomspace(least, most, NUM_SIZES).round().astype(int)).tolist()
        return sorted({*steps, *([self.run.blocks] if self.run.blocks else [])})

    def _lru_enough(self) -> int:
        return max(self.curve.smallest(ENOUGH), self.requests.longest, 1)

    def _enough(self) -> Size | None:
        """The smallest size that finds nearly all that an endless cache finds."""
        if not self.requests.query_tokens or not self.curve.ceiling:
            return None
        if self.endless is None:
            return self.size(self._lru_enough())
        wanted = ENOUGH * self.endless.num_found_tokens
        low, high = max(self.requests.longest, 1), max(_everything(self.requests), 1)
        guess = min(high, self._lru_enough())
        while low < high and high - low > max(1, high // 100):
            played = self._play(guess)
            if played.num_found_tokens >= wanted and not played.stuck:
                high = guess
            else:
                low = guess + 1
            guess = min((low + high) // 2, 2 * low)
        return self.size(high)

    def _longer_blocks(self) -> dict[int, int]:
        """What blocks of twice and four times the size find, with room for all."""
        found = {self.requests.block_size: round(self.curve.ceiling) * self.requests.block_size}
        for times in (2, 4) if len(self.requests.ids) <= REPLAY_UP_TO else ():
            size = times * self.requests.block_size
            found[size] = round(lru_curve(self.requests.with_block_size(size)).ceiling) * size
        return found


def _everything(requests: BlockRequests) -> int:
    """Blocks for all requests at once, each with its own: such a cache never evicts."""
    computed = requests.num_prompt_tokens + np.maximum(requests.num_generation_tokens - 1, 0)
    return int((-(-computed // requests.block_size)).sum()) + 1


def _enough_for_all(requests: BlockRequests, rules: Rules | None) -> int:
    """Any larger cache does exactly what one of this size does: no request ever waits for blocks, those that the engine
    keeps free included. A replay takes memory for each block."""
    kept_free = min(rules.watermark, 0.99) if rules is not None else 0.0
    return int((_everything(requests) + 1) / (1 - kept_free)) + 2


def _in_part(requests: BlockRequests) -> int:
    """The most tokens that agree with something that came before, and lie in a block that does not agree as a whole."""
    size, ids, starts = requests.block_size, requests.ids, requests.offsets[:-1]
    if not len(ids):
        return 0
    first = np.empty(requests.num_distinct, np.int64)
    first[ids[::-1]] = np.arange(len(ids))[::-1]
    begins = np.repeat(starts, requests.num_blocks)
    asked = np.arange(len(ids)) - begins < np.repeat(requests.num_looked_up_blocks, requests.num_blocks)
    known = np.concatenate(([0], np.cumsum(asked & (first[ids] < begins))))
    hits = known[requests.offsets[1:]] - known[starts]
    rest = np.clip(requests.num_prompt_tokens - 1 - hits * size, 0, size - 1)
    return int(rest[1:][requests.looked_up[1:]].sum())


def _points(curve: Curve, block_size: int, most: int = 200) -> tuple[tuple[int, int], ...]:
    last = int(len(curve.found) / curve.rate)
    sizes = np.unique(np.geomspace(1, max(last, 2), most).round().astype(int)).tolist()
    return tuple((n, round(curve.at(n)) * block_size) for n in sizes)


def prefill_speed(steps: Table) -> float | None:
    """Prompt tokens that an engine computes in a second, from those of its steps that computed little else.

    Args:
        steps: of its core.
    """
    prefill = steps["num_prefill_tokens"] + steps["num_recomputed_tokens"]
    mostly = (2 * prefill > steps["num_scheduled_tokens"]) & (steps["t_update_ns"] >= 0)
    ns = int((steps["t_end_ns"] - steps["t_schedule_ns"])[mostly].sum())
    tokens = int(prefill[mostly].sum())
    return tokens / (ns / 1e9) if ns > 0 and tokens else None


def check_again(requests: BlockRequests, run: Run) -> Run:
    """The run, with a reason more why it is estimated if the replay does not find what the engine found."""
    return replace(run, why_estimated=_Study(requests, run).reasons) if run.rules is not None else run
