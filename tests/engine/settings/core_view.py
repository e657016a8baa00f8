"""What the engine core itself does in each step, seen on its scheduler in this process: nothing of it is kvhook's.

The scheduler's methods are wrapped on the object. A `View` holds a timeline of what happened between the steps, and a
`Step` for each call of `LLMEngine.step`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple


class Stats(NamedTuple):
    """One `SchedulerStats` as the scheduler made it. Its counters are of the time since the one before."""

    kv_cache_usage: float
    num_running_reqs: int
    num_waiting_reqs: int
    num_skipped_waiting_reqs: int
    prefix_cache_requests: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    prefix_cache_preempted_requests: int
    prefix_cache_preempted_queries: int
    prefix_cache_preempted_hits: int
    prefix_cache_reset: int
    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int


#: Those that are states: of several in one step the last one counts. The others are added up.
STATES = ("kv_cache_usage", "num_running_reqs", "num_waiting_reqs", "num_skipped_waiting_reqs")
COUNTS = tuple(name for name in Stats._fields if name not in STATES)


def read(stats: Any) -> Stats:
    prefix, drafts = stats.prefix_cache_stats, getattr(stats, "spec_decoding_stats", None)
    deferred = getattr(stats, "num_skipped_waiting_reqs", 0)
    of_prefix = [
        int(getattr(prefix, name, 0))
        for name in (
            "requests",
            "queries",
            "hits",
            "preempted_requests",
            "preempted_queries",
            "preempted_hits",
            "reset",
        )
    ]
    of_drafts = [int(getattr(drafts, name, 0)) for name in Stats._fields[-3:]]
    usage = stats.kv_cache_usage if hasattr(stats, "kv_cache_usage") else stats.gpu_cache_usage
    return Stats(usage, stats.num_running_reqs, stats.num_waiting_reqs + deferred, deferred, *of_prefix, *of_drafts)


class Output(NamedTuple):
    """What the core gave out for one request in one step."""

    request: int
    tokens: list[int]
    finished: bool
    preemptions: int
    #: None where it is not said with this output
    cached: int | None


class Batch(NamedTuple):
    """What the scheduler and its pool hold as soon as a batch has been put together. All but ``number`` are columns of
    kvhook's core steps."""

    #: the how-manieth that this scheduler put together, from 0
    number: int
    num_running_reqs: int
    num_waiting_reqs: int
    num_scheduled_tokens: int
    num_scheduled_reqs: int
    num_preempted_reqs: int
    num_kv_blocks_peak: int
    num_kv_blocks_cached: int
    num_kv_blocks_empty: int
    num_kv_tokens: int


@dataclasses.dataclass
class Step:
    """What the core did while `LLMEngine.step` ran once."""

    stats: list[Stats] = dataclasses.field(default_factory=list)
    #: per batch that was put together: tokens of each request, and blocks in use as soon as that was done
    scheduled: list[dict[int, int]] = dataclasses.field(default_factory=list)
    blocks_scheduled: list[int] = dataclasses.field(default_factory=list)
    outputs: list[Output] = dataclasses.field(default_factory=list)
    blocks_after: int = -1

    def state(self, name: str) -> float:
        return float(getattr(self.stats[-1], name))

    def count(self, name: str) -> int:
        return sum(getattr(one, name) for one in self.stats)


@dataclasses.dataclass
class Request:
    """A request as the scheduler got it; with n > 1 each sample is one."""

    number: int
    id: str
    prompt: list[int]
    priority: int
    looks_up: bool
    tokens: list[int] = dataclasses.field(default_factory=list)
    #: the core said that it is finished; else it was taken out from outside, or is not finished
    finished: bool = False


class Event(NamedTuple):
    """Something in the order in which it came: "add", "step", "finish" (from outside), "reset"."""

    what: str
    requests: tuple[int, ...] = ()
    flag: bool = False


class View:
    """An engine core seen from inside its process."""

    def __init__(self, engine: Any) -> None:
        self.core = engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.pool = self.scheduler.kv_cache_manager.block_pool
        #: a step gives out what an earlier batch made
        self.asynchronous = bool(getattr(engine.vllm_config.scheduler_config, "async_scheduling", False))
        #: what the engine made of what was asked for: before 0.10 it has no prefix cache for pooling
        self.caching = bool(engine.vllm_config.cache_config.enable_prefix_caching)
        self._open: Step | None = None
        self._batches = 0
        self.begin()

    def begin(self) -> None:
        """A new case: what was seen before is forgotten."""
        self.requests: list[Request] = []
        self.steps: list[Step] = []
        self.timeline: list[Event] = []
        self.batches: list[Batch] = []
        self._number: dict[str, int] = {}

    def used(self) -> int:
        """Blocks in use, by the pool's own list of free ones."""
        return int(self.pool.num_gpu_blocks - 1 - self.pool.free_block_queue.num_free_blocks)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around a call of `LLMEngine.step`."""
        self._open = Step()
        self.steps.append(self._open)
        self.timeline.append(Event("step"))
        try:
            yield
        finally:
            self._open.blocks_after = self.used()
            self._open = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        wrapped = {
            "add_request": self._add,
            "finish_requests": self._finish,
            "reset_prefix_cache": self._reset,
            "schedule": self._schedule,
            "update_from_output": self._update,
            "make_stats": self._stats,
        }
        before = {name: vars(self.scheduler)[name] for name in wrapped if name in vars(self.scheduler)}
        for name, seen in wrapped.items():
            setattr(self.scheduler, name, _call(seen, getattr(self.scheduler, name)))
        try:
            yield
        finally:
            for name in wrapped:
                delattr(self.scheduler, name)
            # what kvhook has put there stays for the next case
            vars(self.scheduler).update(before)

    def _now(self) -> Step:
        # asked for outside of a step nothing is made; were it so, it would have no place in the record
        assert self._open is not None, "the scheduler worked outside of LLMEngine.step"
        return self._open

    def _add(self, call: Any, request: Any, *args: Any) -> Any:
        number = len(self.requests)
        self._number[request.request_id] = number
        sampling = request.sampling_params
        skips = sampling is not None and sampling.prompt_logprobs is not None
        if getattr(request, "skip_reading_prefix_cache", None) is not None:
            skips = bool(request.skip_reading_prefix_cache)
        self.requests.append(
            Request(number, request.request_id, list(request.prompt_token_ids), request.priority, not skips)
        )
        self.timeline.append(Event("add", (number,)))
        return call(request, *args)

    def _finish(self, call: Any, ids: Any, *args: Any) -> Any:
        named = [ids] if isinstance(ids, str) else list(ids)
        alive = tuple(self._number[one] for one in named if one in self.scheduler.requests)
        self.timeline.append(Event("finish", alive))
        return call(ids, *args)

    def _reset(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        self.timeline.append(Event("reset", flag=bool((args or (kwargs.get("reset_running_requests", False),))[0])))
        return call(*args, **kwargs)

    def _schedule(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        before = {request.request_id for request in self.scheduler.running}
        found = call(*args, **kwargs)
        step = self._now()
        self.batches.append(self._batch(found, before))
        self._batches += 1
        step.scheduled.append({self._number[one]: n for one, n in found.num_scheduled_tokens.items()})
        step.blocks_scheduled.append(self.used())
        return found

    def _batch(self, found: Any, before: set[str]) -> Batch:
        scheduler, null = self.scheduler, getattr(self.pool, "null_block", None)
        blocks = [block for block in self.pool.blocks if block is not null]
        queues = ("waiting", "skipped_waiting", "kv_holding_waiting")
        return Batch(
            self._batches,
            len(scheduler.running),
            sum(len(getattr(scheduler, name, ())) for name in queues),
            sum(found.num_scheduled_tokens.values()),
            len(found.num_scheduled_tokens),
            len(before - {request.request_id for request in scheduler.running}),
            sum(1 for block in blocks if block.ref_cnt),
            sum(1 for block in blocks if not block.ref_cnt and block.block_hash is not None),
            sum(1 for block in blocks if not block.ref_cnt and block.block_hash is None),
            self._held(),
        )

    def _held(self) -> int:
        """Tokens in the blocks in use, each block once."""
        manager, held = self.scheduler.kv_cache_manager, dict[int, int]()
        for request in self.scheduler.running:
            blocks = manager.get_block_ids(request.request_id)
            blocks = blocks[0] if blocks and isinstance(blocks[0], (list, tuple)) else blocks
            size = self.scheduler.vllm_config.cache_config.block_size
            for i, block in enumerate(blocks):
                held[block] = max(held.get(block, 0), min(size, max(0, request.num_computed_tokens - i * size)))
        return sum(held.values())

    def _update(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        by_client = call(*args, **kwargs)
        for outputs in by_client.values():
            for one in outputs.outputs:
                request = self.requests[self._number[one.request_id]]
                events = [event.type.name for event in one.events or ()]
                first = not request.tokens
                tokens = list(one.new_token_ids)
                request.tokens += tokens
                request.finished = one.finish_reason is not None
                self._now().outputs.append(
                    Output(request.number, tokens, request.finished, events.count("PREEMPTED"), _cached(one, first))
                )
        return by_client

    def _stats(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        stats = call(*args, **kwargs)
        if stats is not None:
            self._now().stats.append(read(stats))
        return stats


def _call(seen: Any, original: Any) -> Any:
    return lambda *args, **kwargs: seen(original, *args, **kwargs)


def _cached(output: Any, first: bool) -> int | None:
    """Prompt tokens that the request had from a cache, where the first output says so."""
    if not first:
        return None
    if hasattr(output, "prefill_stats"):
        return None if output.prefill_stats is None else int(output.prefill_stats.num_cached_tokens)
    return getattr(output, "num_cached_tokens", None)
