"""A reference model of vLLM's scheduler and prefix cache: first come, first served; least recently used.

Written from what vLLM says it does, without a line of vLLM or kvhook in it. It is told the requests and the tokens that
the "model" generates, and predicts everything else, block by block: what is scheduled, which blocks are handed out,
found, cached, given back and evicted, who is preempted, and why a look-up found no more.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Event(NamedTuple):
    """Something that happened to a block."""

    what: str
    step: int
    request: int
    block: int


class Lookup(NamedTuple):
    """A look-up that a request was then scheduled with."""

    step: int
    request: int
    resumed: int
    tries: int
    tokens: int
    found: int
    reason: str
    block: int
    evicted_steps: int
    evicted_by: int
    #: of that block and those behind it that had been evicted
    evicted_tokens: int = 0


@dataclass
class Request:
    """One request."""

    number: int
    tokens: Callable[[], list[int]]
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    cached: int = 0
    tries: int = 0
    preempted: bool = False
    seen: tuple[int, str, int, int, int] = (0, "none", -1, -1, -1)


class Model:
    """The scheduler and the cache.

    Args:
        blocks: that can be used; they are numbered from 1.
        block_size: tokens of a block.
        budget: tokens of a step.
        places: requests that can run at a time.
        whole: whether a request is admitted only if all its tokens find room.
        empty_first: whether blocks without content are handed out before all others, and the last one given back first.
    """

    def __init__(
        self, blocks: int, block_size: int, budget: int, places: int, *, whole: bool, empty_first: bool
    ) -> None:
        self.size, self.budget, self.places = block_size, budget, places
        self.whole, self.empty_first = whole, empty_first
        self.free = deque(range(1, blocks + 1))
        self.refs = dict.fromkeys(self.free, 0)
        self.content: dict[int, tuple[int, ...]] = {}
        self.where: dict[tuple[int, ...], dict[int, None]] = {}
        self.evicted: dict[tuple[int, ...], tuple[int, int]] = {}
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.step = 0
        self.events: list[Event] = []
        #: what each "cache" event was about, in order
        self.contents: list[tuple[int, ...]] = []
        self.lookups: list[Lookup] = []
        self.preemptions: list[tuple[int, int, int]] = []

    def schedule(self) -> dict[int, int]:
        """One step: request -> tokens."""
        left, scheduled, preempted = self.budget, dict[int, int](), False
        index = 0
        while index < len(self.running) and left:
            request = self.running[index]
            count = min(len(request.tokens()) - request.computed, left)
            need = self._need(request.computed + count) - len(request.blocks)
            while need > len(self.free):
                victim = self.running.pop()
                self._preempt(victim)
                preempted = True
                if victim is request:
                    break
            if request.preempted:
                break
            self._allocate(request, need)
            self._fill(request, request.computed + count)
            scheduled[request.number] = count
            left -= count
            index += 1
        while not preempted and left and self.waiting and len(self.running) < self.places:
            request = self.waiting[0]
            hits = self._look_up(request)
            total = len(request.tokens())
            count = min(total - len(hits) * self.size, left)
            need = self._need(len(hits) * self.size + count) - len(hits)
            unheld = sum(1 for block in hits if not self.refs[block])
            if self.whole and self._need(total) - len(hits) + unheld > len(self.free):
                break
            if need + unheld > len(self.free):
                break
            self.waiting.popleft()
            self._admit(request, hits, need, count)
            scheduled[request.number] = count
            left -= count
        for request in self.running:
            request.computed += scheduled.get(request.number, 0)
            if self.lookups and self.lookups[-1].step == self.step:
                self._cost_of_evictions(request)
        self.step += 1
        return scheduled

    def _cost_of_evictions(self, request: Request) -> None:
        """How much of what a request looked up in this step had been there before."""
        for i, lookup in enumerate(self.lookups):
            if (lookup.step, lookup.request, lookup.reason) == (self.step, request.number, "evicted"):
                tokens, end = request.tokens(), lookup.block
                while end < (len(tokens) - 1) // self.size and tuple(tokens[: (end + 1) * self.size]) in self.evicted:
                    end += 1
                self.lookups[i] = lookup._replace(evicted_tokens=(end - lookup.block) * self.size)

    def finish(self, request: Request) -> None:
        """A request has all it wanted, or is aborted."""
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self._give_back(request)

    def _need(self, tokens: int) -> int:
        return -(-tokens // self.size)

    def _look_up(self, request: Request) -> list[int]:
        tokens, hits = request.tokens(), list[int]()
        most = (len(tokens) - 1) // self.size
        while len(hits) < most and (blocks := self.where.get(tuple(tokens[: (len(hits) + 1) * self.size]))):
            hits.append(next(iter(blocks)))
        request.tries += 1
        reason, by, steps, block = "none", -1, -1, len(hits)
        if not most:
            reason = "short"
        elif len(hits) < most:
            gone = self.evicted.get(tuple(tokens[: (len(hits) + 1) * self.size]))
            reason = "evicted" if gone else "diverged" if hits else "never_seen"
            steps, by = (self.step - gone[0], gone[1]) if gone else (-1, -1)
        else:
            block = -1
        request.seen = (len(hits) * self.size, reason, block, steps, by)
        return hits

    def _admit(self, request: Request, hits: list[int], need: int, count: int) -> None:
        found, reason, block, steps, by = request.seen
        resumed = int(request.preempted)
        self.lookups.append(
            Lookup(
                self.step,
                request.number,
                resumed,
                request.tries,
                len(request.tokens()),
                found,
                reason,
                block,
                steps,
                by,
            )
        )
        request.tries, request.preempted = 0, False
        for block in hits:
            if not self.refs[block]:
                self.free.remove(block)
            self.refs[block] += 1
            self.events.append(Event("hit", self.step, request.number, block))
        request.blocks, request.cached, request.computed = list(hits), len(hits), len(hits) * self.size
        self._allocate(request, need)
        self._fill(request, request.computed + count)
        self.running.append(request)

    def _allocate(self, request: Request, count: int) -> None:
        for _ in range(count):
            block = self.free.popleft()
            content = self.content.pop(block, None)
            if content is not None:
                self._forget(block, content)
                self.evicted[content] = (self.step, request.number)
                self.events.append(Event("evict", self.step, request.number, block))
            self.refs[block] = 1
            request.blocks.append(block)
            self.events.append(Event("allocate", self.step, request.number, block))

    def _forget(self, block: int, content: tuple[int, ...]) -> None:
        del self.where[content][block]
        if not self.where[content]:
            del self.where[content]

    def _fill(self, request: Request, tokens: int) -> None:
        """Full blocks can be found from now on."""
        known = request.tokens()
        for index in range(request.cached, min(tokens, len(known)) // self.size):
            content = tuple(known[: (index + 1) * self.size])
            block = request.blocks[index]
            self.content[block] = content
            self.where.setdefault(content, {})[block] = None
            self.events.append(Event("cache", self.step, request.number, block))
            self.contents.append(content)
            request.cached = index + 1

    def _give_back(self, request: Request) -> None:
        empty: list[Any] = []
        cached: list[Any] = []
        for block in reversed(request.blocks):
            self.refs[block] -= 1
            if not self.refs[block]:
                (cached if block in self.content else empty).append(block)
                if not self.empty_first:
                    self.free.append(block)
                self.events.append(Event("free", self.step, request.number, block))
        if self.empty_first:
            self.free.extendleft(reversed(empty))
            self.free.extend(cached)
        request.blocks, request.cached = [], 0

    def _preempt(self, request: Request) -> None:
        self.preemptions.append((self.step, request.number, request.computed))
        self._give_back(request)
        request.computed, request.preempted = 0, True
        self.waiting.appendleft(request)


def play(driver: Any, model: Model, arrivals: dict[int, list[tuple[list[int], int]]]) -> int:
    """Run vLLM's scheduler and the model side by side, and compare what is scheduled in each step; gives their number.

    Args:
        driver: a `tests.core.scheduler_here.Driver`.
        model: of the same settings.
        arrivals: step -> the prompts that come before it, with the most tokens to generate.
    """
    requests: dict[str, tuple[Any, Request]] = {}
    for step in range(100_000):
        for prompt, most in arrivals.get(step, ()):
            theirs = driver.add(prompt, max_tokens=most)
            mine = Request(len(requests), functools.partial(_tokens_of, theirs))
            requests[theirs.request_id] = (theirs, mine)
            model.waiting.append(mine)
        if not driver.scheduler.has_unfinished_requests() and step > max(arrivals):
            return step
        output = driver.schedule()
        scheduled = model.schedule()
        assert {requests[name][1].number: n for name, n in output.num_scheduled_tokens.items()} == scheduled, step
        driver.update(output)
        for theirs, mine in map(requests.__getitem__, output.num_scheduled_tokens):
            if theirs.is_finished() and (mine in model.running or mine in model.waiting):
                model.finish(mine)
    raise AssertionError("no end")


def _tokens_of(request: Any) -> list[int]:
    return list(request.all_token_ids)
