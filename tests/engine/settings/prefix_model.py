"""A reference model of vLLM's scheduler and prefix cache, from which look-ups, hits and blocks in use are predicted.

Written from how vLLM describes them, not from its code's objects: full blocks are found by the hash of all tokens up to
their end; free blocks lie in a queue in the order in which they will be taken; those that are freed go to its end, the
last block of a request first; a block that is found again leaves the queue; one that is taken loses its hash.

It is exact as long as every request gets its blocks when it asks for them. Releases differ in what they do then, so the
prediction ends there (`Prediction.exact`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

#: Blocks that a release may hold back, beside those that it needs.
HELD_BACK = 2


class Rules(NamedTuple):
    """The settings, and where releases differ."""

    blocks: int
    block_size: int
    chunk: int
    seqs: int
    caching: bool
    by_priority: bool
    #: blocks without a hash are put at the front of the free queue
    unhashed_first: bool
    #: a request that was preempted before its first token is told what its last look-up found, not its first
    last_look_up_told: bool


@dataclasses.dataclass
class Seen:
    """What one step is predicted to say."""

    prefix_cache_requests: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    prefix_cache_preempted_requests: int = 0
    prefix_cache_preempted_queries: int = 0
    prefix_cache_preempted_hits: int = 0
    num_running_reqs: int = 0
    num_waiting_reqs: int = 0
    blocks_scheduled: int = 0
    blocks_after: int = 0
    scheduled: dict[int, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Prediction:
    steps: list[Seen]
    #: per request the tokens it found when it first got its place, None if it never did
    cached: list[int | None]
    exact: bool


class Pool:
    """Blocks, who holds them, and which can be found by what."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        #: the order of a dict is that of the queue; unhashed blocks may come to its front, so there are two
        self.front: list[int] = []
        self.free: dict[int, None] = dict.fromkeys(range(rules.blocks))
        self.held: dict[int, int] = {}
        self.key_of: dict[int, int] = {}
        self.found: dict[int, dict[int, None]] = {}
        self.order_is_known = True

    @property
    def used(self) -> int:
        return len(self.held)

    @property
    def available(self) -> int:
        return self.rules.blocks - len(self.held)

    def look_up(self, keys: Sequence[int]) -> list[int]:
        """The blocks of the longest beginning that is there."""
        blocks = []
        for key in keys:
            if not self.found.get(key):
                break
            blocks.append(next(iter(self.found[key])))
        return blocks

    def touch(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            if block not in self.held:
                self._leave(block)
            self.held[block] = self.held.get(block, 0) + 1

    def take(self, count: int) -> list[int]:
        blocks = []
        for _ in range(count):
            block = self.front[0] if self.front else next(iter(self.free))
            self._leave(block)
            key = self.key_of.pop(block, None)
            if key is not None:
                del self.found[key][block]
            self.held[block] = 1
            blocks.append(block)
        return blocks

    def _leave(self, block: int) -> None:
        if block in self.free:
            del self.free[block]
        else:
            self.front.remove(block)

    def give_back(self, blocks: Sequence[int]) -> None:
        """The last one first."""
        first = []
        for block in reversed(blocks):
            self.held[block] -= 1
            if self.held[block]:
                continue
            del self.held[block]
            if block not in self.key_of and self.rules.unhashed_first:
                first.append(block)
            else:
                self.free[block] = None
        self.front[:0] = first

    def hash(self, block: int, key: int) -> None:
        self.key_of[block] = key
        self.found.setdefault(key, {})[block] = None

    def forget(self) -> bool:
        """Reset: only if nothing is in use."""
        if self.held:
            return False
        self.key_of, self.found = {}, {}
        return True


@dataclasses.dataclass
class Running:
    number: int
    prompt: list[int]
    generated: list[int]
    ends_by_itself: bool
    looks_up: bool
    rank: tuple[int, int]
    computed: int = 0
    given: int = 0
    hashed: int = 0
    preempted: int = 0
    blocks: list[int] = dataclasses.field(default_factory=list)

    @property
    def known(self) -> int:
        return len(self.prompt) + self.given

    def tokens(self, start: int, end: int) -> tuple[int, ...]:
        return tuple((self.prompt + self.generated)[start:end])


class Model:
    """Plays a timeline of `core_view.Event` again."""

    def __init__(self, rules: Rules, requests: Sequence[Any]) -> None:
        self.rules, self.requests = rules, requests
        self.pool = Pool(rules)
        self.running: list[Running] = []
        self.waiting: list[Running] = []
        self.steps: list[Seen] = []
        self.cached: list[int | None] = [None] * len(requests)
        self.exact = True
        self._keys: dict[tuple[int, tuple[int, ...]], int] = {}

    def replay(self, timeline: Iterable[Any]) -> Prediction:
        stepping = False
        for event in timeline:
            if event.what == "step":
                if stepping:
                    self._end_step()
                stepping = self._begin_step()
                continue
            # a request that is taken out because of a stop string is taken out when the stats are made
            if event.what != "finish" and stepping:
                stepping = self._end_step()
            if event.what == "add":
                self._add(self.requests[event.requests[0]])
            elif event.what == "reset":
                self._reset(event.flag)
            else:
                if stepping:
                    stepping = self._end_step()
                self._take_out(event.requests)
        if stepping:
            self._end_step()
        return Prediction(self.steps, self.cached, self.exact)

    def _add(self, request: Any) -> None:
        rank = (request.priority if self.rules.by_priority else 0, request.number)
        self._queue(
            Running(request.number, request.prompt, request.tokens, request.finished, request.looks_up, rank), False
        )

    def _queue(self, request: Running, in_front: bool) -> None:
        self.waiting.insert(0 if in_front else len(self.waiting), request)
        if self.rules.by_priority:
            self.waiting.sort(key=lambda one: one.rank)

    def _take_out(self, numbers: Sequence[int]) -> None:
        some = [one for one in self.running + self.waiting if one.number in numbers]
        if sum(bool(one.blocks) for one in some) > 1:
            # their order is that of a set of strings
            self.pool.order_is_known = False
        for one in some:
            self.pool.give_back(one.blocks)
        self.running = [one for one in self.running if one not in some]
        self.waiting = [one for one in self.waiting if one not in some]

    def _reset(self, with_running: bool) -> None:
        while with_running and self.running:
            one = self.running.pop()
            self.pool.give_back(one.blocks)
            one.blocks, one.computed, one.hashed = [], 0, 0
            one.preempted += 1
            self._queue(one, True)
        if self.pool.forget():
            self.pool.order_is_known = True

    def _begin_step(self) -> bool:
        self.now = Seen()
        self.steps.append(self.now)
        budget = self.rules.chunk
        for one in list(self.running):
            budget -= self._schedule(one, min(one.known - one.computed, budget))
        while self.waiting and budget > 0 and len(self.running) < self.rules.seqs:
            one = self.waiting.pop(0)
            found = self._look_up(one)
            self.running.append(one)
            self.pool.touch(found)
            one.blocks, one.hashed = found, len(found)
            one.computed = len(found) * self.rules.block_size
            budget -= self._schedule(one, min(one.known - one.computed, budget), whole=True)
        self.now.blocks_scheduled = self.pool.used
        return True

    def _look_up(self, one: Running) -> list[int]:
        """At most all tokens but the last, which has to be computed."""
        if not (one.looks_up and self.rules.caching):
            self._tell(one, 0)
            return []
        found = self.pool.look_up(self._hashes(one, (one.known - 1) // self.rules.block_size))
        kind = "prefix_cache_preempted" if one.preempted else "prefix_cache"
        hits = len(found) * self.rules.block_size
        for what, by in (("requests", 1), ("queries", one.known), ("hits", hits)):
            setattr(self.now, f"{kind}_{what}", getattr(self.now, f"{kind}_{what}") + by)
        self._tell(one, hits)
        return found

    def _tell(self, one: Running, hits: int) -> None:
        """What vLLM says of the request: how many of its tokens were found."""
        again = self.rules.last_look_up_told and not one.given
        if self.cached[one.number] is None or again:
            self.cached[one.number] = hits

    def _hashes(self, one: Running, blocks: int) -> list[int]:
        """A number for each whole block and all that is before it."""
        key, keys, size = -1, [], self.rules.block_size
        for i in range(blocks):
            key = self._keys.setdefault((key, one.tokens(i * size, (i + 1) * size)), len(self._keys))
            keys.append(key)
        return keys

    def _schedule(self, one: Running, tokens: int, whole: bool = False) -> int:
        if tokens <= 0:
            return 0
        size = self.rules.block_size
        needed = -(-(one.computed + tokens) // size) - len(one.blocks)
        full = -(-one.known // size) - len(one.blocks) if whole else needed
        if max(needed, full) + HELD_BACK > self.pool.available:
            self.exact = False
        if needed > self.pool.available:
            return 0
        evicted_before = len(self.pool.key_of)
        one.blocks += self.pool.take(max(needed, 0))
        if len(self.pool.key_of) < evicted_before and not self.pool.order_is_known:
            self.exact = False
        self.now.scheduled[one.number] = tokens
        if self.rules.caching:
            done = min(one.computed + tokens, one.known) // size
            for i, key in enumerate(self._hashes(one, done)):
                if i >= one.hashed:
                    self.pool.hash(one.blocks[i], key)
            one.hashed = max(one.hashed, done)
        return tokens

    def _end_step(self) -> bool:
        for one in list(self.running):
            one.computed += self.now.scheduled.get(one.number, 0)
            if one.number in self.now.scheduled and one.computed >= one.known:
                one.given += bool(one.generated)
                if one.ends_by_itself and one.given == len(one.generated):
                    self.running.remove(one)
                    self.pool.give_back(one.blocks)
        self.now.num_running_reqs, self.now.num_waiting_reqs = len(self.running), len(self.waiting)
        self.now.blocks_after = self.pool.used
        return False
