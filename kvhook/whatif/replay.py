"""vLLM's scheduler and prefix cache, played again with another number of blocks.

Requests are admitted first come, first served, in chunks that fit the token budget of a step. A running request that
finds no free block preempts the one that was admitted last. Requests come in as they did in the run: all at once in a
busy time, or so many steps after its begin. What it cannot know is how long a step takes, so that requests that came
while others ran may come a little earlier or later in a real engine.

Steps in which requests only decode are not looked at one by one: a request has something to do there only when it
fills a block, needs a new one, or ends.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvhook.whatif.pool import Pool
from kvhook.whatif.requests import BlockRequests, Ints


@dataclass(frozen=True)
class Rules:
    """How an engine schedules: what the replay needs of its settings.

    Attributes:
        token_budget: most tokens of a step.
        max_num_seqs: most running requests.
        chunked: whether a prompt may take several steps.
        whole_prompt_must_fit: whether a request is admitted only if there are blocks for its whole prompt.
        empty_blocks_first: whether blocks without content are handed out before all others.
        watermark: share of all blocks, the null block included, that an admission leaves free while others run.
    """

    token_budget: int = 8192
    max_num_seqs: int = 256
    chunked: bool = True
    whole_prompt_must_fit: bool = True
    empty_blocks_first: bool = True
    watermark: float = 0.0


@dataclass(frozen=True)
class Replayed:
    """What came of a replay.

    Attributes:
        found: tokens that each request found when it was first admitted; -1 for one that never was.
        num_found_tokens: their sum.
        num_resumed_found_tokens: found by requests that came back after a preemption.
        num_preemptions: how often a request was preempted.
        num_recomputed_tokens: tokens computed once more after preemptions.
        num_computed_tokens: prompt tokens computed, the recomputed ones included.
        num_steps: steps in which something was scheduled.
        num_evicted: blocks evicted.
        peak: most blocks in use at a time.
        stuck: requests that never found room: the cache is too small for them.
    """

    found: Ints
    num_found_tokens: int
    num_resumed_found_tokens: int
    num_preemptions: int
    num_recomputed_tokens: int
    num_computed_tokens: int
    num_steps: int
    num_evicted: int
    peak: int
    stuck: int


def replay(requests: BlockRequests, blocks: int, rules: Rules) -> Replayed:
    """Play the requests of each engine core with so many blocks.

    Args:
        requests: of the run.
        blocks: that can be used.
        rules: how the engine schedules.
    """
    cores = np.unique(requests.core).tolist()
    played = []
    found = np.full(len(requests), -1, np.int64)
    for core in cores:
        places = np.flatnonzero(requests.core == core)
        one = _Engine(requests.select(places), blocks, rules)
        one.run()
        found[places] = one.found
        played.append(one)
    return Replayed(
        found=found,
        num_found_tokens=int(np.maximum(found, 0)[requests.looked_up].sum()),
        num_resumed_found_tokens=sum(e.resumed_found for e in played),
        num_preemptions=sum(e.preemptions for e in played),
        num_recomputed_tokens=sum(e.recomputed for e in played),
        num_computed_tokens=sum(e.computed_tokens for e in played),
        num_steps=sum(e.steps for e in played),
        num_evicted=sum(e.pool.evicted for e in played),
        peak=max((e.peak for e in played), default=0),
        stuck=sum(e.stuck for e in played),
    )


class _Request:
    """One request. While it decodes, it has computed ``base + step`` tokens before a step."""

    __slots__ = (
        "base", "blocks", "cached", "computed", "contents", "decoding", "finish", "generated", "goal", "high", "looks",
        "number", "order", "prompt", "since", "start_generated", "version",
    )  # fmt: skip

    def __init__(self, number: int, prompt: int, goal: int, contents: list[int], looks: bool) -> None:
        self.number, self.prompt, self.goal, self.contents, self.looks = number, prompt, goal, contents, looks
        self.blocks: list[int] = []
        self.cached = self.computed = self.generated = self.high = 0
        self.order = -1
        self.decoding = False
        self.base = self.since = self.start_generated = self.finish = 0
        #: events that were planned before a preemption are of an older version
        self.version = 0

    @property
    def num_tokens(self) -> int:
        return self.prompt + self.generated


class _Engine:
    """One engine core."""

    def __init__(self, requests: BlockRequests, blocks: int, rules: Rules) -> None:
        self.rules, self.size = rules, requests.block_size
        self.pool = Pool(blocks, empty_first=rules.empty_blocks_first)
        self.total = blocks
        self._watermark = int(rules.watermark * (blocks + 1))
        self.found = np.full(len(requests), -1, np.int64)
        self._coming = self._make(requests)
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []
        #: the one request whose prefill goes on; step -> what decoding requests have to do in it
        self._prefilling: _Request | None = None
        self._due: dict[int, list[tuple[int, int, _Request]]] = {}
        self._admissions = 0
        self._refused: tuple[_Request, int, int] | None = None
        self.step = 0
        self.steps = self.preemptions = self.recomputed = self.resumed_found = self.computed_tokens = 0
        self.peak = self.stuck = 0

    def _make(self, requests: BlockRequests) -> deque[tuple[int, int, int, _Request]]:
        ids, offsets = requests.ids.tolist(), requests.offsets.tolist()
        order = np.lexsort((requests.arrival, requests.delay, requests.wave)).tolist()
        columns = ("wave", "delay", "epoch", "num_prompt_tokens", "num_generation_tokens", "looked_up")
        wave, delay, epoch, prompt, goal, looks = (getattr(requests, name).tolist() for name in columns)
        coming: deque[tuple[int, int, int, _Request]] = deque()
        for i in order:
            request = _Request(i, prompt[i], goal[i], ids[offsets[i] : offsets[i + 1]], looks[i])
            coming.append((wave[i], delay[i], epoch[i], request))
        return coming

    # ---- the run ---------------------------------------------------------------------------------------------------

    def run(self) -> None:
        wave = epoch = None
        begin = 0
        while self._coming or self._waiting or self._running:
            if not self._waiting and not self._running:
                next_wave, delay, next_epoch, _ = self._coming[0]
                if epoch is not None and next_epoch != epoch:
                    self.pool.reset()
                # a busy time begins, or the rest of one after a pause
                begin = self.step - (delay if next_wave == wave else 0)
                wave, epoch = next_wave, next_epoch
            while self._coming and self._coming[0][0] == wave and begin + self._coming[0][1] <= self.step:
                self._waiting.append(self._coming.popleft()[3])
            if self._skip(begin + self._coming[0][1] if self._coming and self._coming[0][0] == wave else None):
                continue
            if not self._step():
                # nothing runs and the first in line does not fit: it never will
                self.stuck += 1
                self._waiting.popleft()

    def _skip(self, next_arrival: int | None) -> bool:
        """Leave out the steps in which every running request decodes one more token and nothing else happens; whether
        there were any."""
        if self._prefilling is not None or not self._running or self.step in self._due:
            return False
        if self._waiting and len(self._running) < self.rules.max_num_seqs:
            left = self.rules.token_budget - len(self._running)
            if self._refused != (self._waiting[0], self.pool.version, left):
                return False
        step = min(self._due)
        step = step if next_arrival is None else min(step, next_arrival)
        self.steps += step - self.step
        self.step = step
        return True

    def _step(self) -> bool:
        """One step; False if nothing could be scheduled."""
        done: list[_Request] = []
        preempted = self._decode(done)
        decoding = len(self._running) - (self._prefilling is not None)
        left = self.rules.token_budget - decoding
        scheduled = decoding > 0
        if self._prefilling is not None and not preempted:
            request = self._prefilling
            count = min(request.num_tokens - request.computed, left)
            if count > 0:
                need = -(-(request.computed + count) // self.size) - len(request.blocks)
                preempted = not self._make_room(need, request)
                if not preempted:
                    request.blocks += self.pool.take(need)
                    left -= count
                    scheduled = True
                    self._compute(request, count, done)
        if not preempted:
            scheduled |= self._admit(left, done)
        self.peak = max(self.peak, self.total - len(self.pool.free))
        if not scheduled and not preempted:
            return False
        self.steps += scheduled
        for request in sorted(done, key=_order):
            self._running.remove(request)
            self._free(request)
        self.step += 1
        return True

    def _decode(self, done: list[_Request]) -> bool:
        """What decoding requests have to do in this step, in the order in which they were admitted."""
        due = self._due.pop(self.step, None)
        if due is None:
            return False
        preempted = False
        for _, version, request in sorted(due, key=_first):
            if request.version != version:
                continue  # it has been preempted, perhaps in this very step
            computed = request.base + self.step
            if computed % self.size == 0:
                if not len(self.pool.free):
                    preempted = True
                    if not self._make_room(1, request):
                        break
                request.blocks += self.pool.take(1)
            if (computed + 1) % self.size == 0:
                self.pool.fill(request.blocks[request.cached], request.contents[request.cached])
                request.cached += 1
            if self.step == request.finish:
                done.append(request)
            else:
                self._plan(request, computed)
        return preempted

    def _make_room(self, need: int, request: _Request) -> bool:
        """Preempt the request that was admitted last until there are blocks; False if this was the request itself."""
        while need > len(self.pool.free):
            victim = self._running.pop()
            self._preempt(victim)
            if victim is request:
                if not self._running:
                    # it had all blocks, and needs more than there are: it would be preempted again and again
                    self._waiting.popleft()
                    self.stuck += 1
                return False
        return True

    def _plan(self, request: _Request, computed: int) -> None:
        """Note the next step in which this request, which has computed so many tokens before this one, does more than
        to decode."""
        size = self.size
        after = computed + 1
        wait = 0 if after % size == 0 else size - 1 - after % size
        step = min(self.step + 1 + wait, request.finish)
        self._due.setdefault(step, []).append((request.order, request.version, request))

    def _compute(self, request: _Request, count: int, done: list[_Request]) -> None:
        """Part of a prefill is scheduled: its full blocks can be found at once, its last one gives a token."""
        end = request.computed + count
        self.computed_tokens += count
        self.recomputed += max(0, min(end, request.high) - request.computed)
        request.computed = end
        for index in range(request.cached, end // self.size):
            self.pool.fill(request.blocks[index], request.contents[index])
        request.cached = max(request.cached, end // self.size)
        if end < request.num_tokens:
            self._prefilling = request
            return
        self._prefilling = None
        request.generated += request.goal > 0
        if request.generated >= request.goal:
            done.append(request)
            return
        request.decoding = True
        request.base, request.since = end - self.step - 1, self.step + 1
        request.start_generated = request.generated
        request.finish = request.since + request.goal - request.generated - 1
        self._plan(request, end - 1)

    def _admit(self, left: int, done: list[_Request]) -> bool:
        """Waiting requests, as long as there are tokens, places and blocks."""
        rules, pool, waiting = self.rules, self.pool, self._waiting
        admitted = False
        while left > 0 and waiting and len(self._running) < rules.max_num_seqs:
            request = waiting[0]
            if self._refused == (request, pool.version, left):
                break
            total = request.num_tokens
            hits = pool.find(request.contents, (total - 1) // self.size) if request.looks else []
            start = len(hits) * self.size
            if not rules.chunked and total - start > left:
                break
            count = min(total - start, left)
            unheld = pool.num_unheld(hits)
            spare = len(pool.free) - (self._watermark if self._running else 0) - unheld + len(hits)
            need = -(-(start + count) // self.size)
            if need > spare or (rules.whole_prompt_must_fit and -(-total // self.size) > spare):
                self._refused = (request, pool.version, left)
                break
            waiting.popleft()
            if self.found[request.number] < 0:
                self.found[request.number] = start
            else:
                self.resumed_found += start
            pool.hold(hits)
            request.blocks = hits + pool.take(need - len(hits))
            request.cached, request.computed = len(hits), start
            request.order = self._admissions
            self._admissions += 1
            self._running.append(request)
            left -= count
            admitted = True
            self._compute(request, count, done)
            if self._prefilling is not None:
                break  # the budget is used up
        return admitted

    def _preempt(self, request: _Request) -> None:
        if request.decoding:
            request.computed = request.base + self.step
            request.generated = request.start_generated + self.step - request.since
        if self._prefilling is request:
            self._prefilling = None
        self.preemptions += 1
        request.high = max(request.high, request.computed)
        request.version += 1
        request.decoding = False
        self._free(request)
        request.computed = 0
        self._waiting.appendleft(request)

    def _free(self, request: _Request) -> None:
        self.pool.give_back(request.blocks)
        request.blocks, request.cached = [], 0


def _order(request: _Request) -> int:
    return request.order


def _first(event: tuple[int, int, Any]) -> int:
    return event[0]
