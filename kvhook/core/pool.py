"""The KV blocks' account: what is handed out, found again, given back and given up, counted as it happens.

A block is in use (somebody holds it), or free. A free block is *cached* if the prefix cache still finds it by its
content, else *empty*. The number of free blocks is vLLM's own; how many of them are cached is kept up here, because
vLLM's map of the cache counts contents rather than blocks, and those in use too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from kvhook.core import native
from kvhook.faults import USERS, contained

if TYPE_CHECKING:
    from kvhook.adapters.core import Core
    from kvhook.core.state import CoreState
    from kvhook.core.taps import Taps

clock = time.monotonic_ns

#: Contents that were evicted and are remembered, to tell "evicted" from "never seen". The oldest is forgotten first.
REMEMBERED = 1 << 16
#: Stands for the request that evicted a block, where there was none.
NOBODY = -1


class PoolAccount:
    """Counts what one block pool does.

    Attributes:
        state: what is counted in.
        evictions: content -> (step, time, number of the request whose allocation took the block).
        just_evicted: content and number of each block that was evicted since that was cleared, to find out for whom.
    """

    def __init__(self, core: Core, failed: Callable[[BaseException], None], state: CoreState) -> None:
        self._pool, self._queue, self._failed, self.state = core.pool, core.queue, failed, state
        self._null = getattr(core.pool, "null_block", None)
        self._hash_of = core.reads["hash_of_block"]
        self._caching = bool(core.facts["enable_prefix_caching"])
        #: a KV connector can have a pool of its own, whose blocks are given back through this one
        self._other_pools = bool(core.facts["connector"])
        self.total: int = core.facts["num_kv_blocks"]
        self.evictions: dict[Any, tuple[int, int, int]] = {}
        self.forgotten = 0
        self.just_evicted: list[tuple[Any, int]] = []
        state.cached, state.shared = self._look()

    def tap(self, taps: Taps) -> None:
        """Put the counting in place."""
        pool = self._pool
        taps.put(pool, "get_new_blocks", native.tap(self.state, "get_new_blocks") or self._on_get_new_blocks)
        taps.put(pool, "touch", self._on_touch)
        taps.put(pool, "free_blocks", self._on_free)
        taps.put(pool, "reset_prefix_cache", self._on_reset)
        if self._caching:
            taps.put(pool, "_maybe_evict_cached_block", self._on_evict)
        if callable(getattr(pool, "unpin_blocks", None)):
            taps.put(pool, "unpin_blocks", self._on_free)

    def blame(self, holders: Mapping[int, int]) -> None:
        """Say for whom the blocks were evicted that were evicted in this step.

        Args:
            holders: block number -> number of the request that got the block.
        """
        for content, block in self.just_evicted:
            by = holders.get(block, NOBODY)
            if by != NOBODY and content in self.evictions:
                self.evictions[content] = (*self.evictions[content][:2], by)
        self.just_evicted.clear()

    @property
    def free(self) -> int:
        """Free blocks, now."""
        return int(self._queue.num_free_blocks)

    def _look(self) -> tuple[int, int]:
        """Cached free blocks, and holds beyond the first, by looking at every block: once, at the start."""
        cached = shared = 0
        for block in self._pool.blocks:
            if block is self._null:
                continue
            if block.ref_cnt:
                shared += block.ref_cnt - 1
            elif block.block_hash is not None:
                cached += 1
        return cached, shared

    # Each of these calls vLLM, and then counts what has changed. What they count cannot raise in a sound vLLM; if it
    # does all the same, the engine goes on and the recording ends.

    def _free_before(self, queue: Any) -> Any:
        """Free blocks, before vLLM is called."""
        try:
            return queue.num_free_blocks
        except USERS:
            raise
        except BaseException as error:
            self._failed(error)
            return 0

    def _on_get_new_blocks(self, original: Callable[..., Any]) -> Callable[..., Any]:
        queue, state = self._queue, self.state

        def get_new_blocks(*args: Any, **kwargs: Any) -> Any:
            before = self._free_before(queue)
            blocks = original(*args, **kwargs)
            try:
                state.allocated += before - queue.num_free_blocks
            except USERS:
                raise
            except BaseException as error:
                self._failed(error)
            return blocks

        return get_new_blocks

    def _on_evict(self, original: Callable[..., Any]) -> Callable[..., Any]:
        evictions, hash_of, state = self.evictions, self._hash_of, self.state

        def _maybe_evict_cached_block(block: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                key = block.block_hash
            except USERS:
                raise
            except BaseException as error:
                key = None
                self._failed(error)
            gone = original(block, *args, **kwargs)
            if gone:
                try:
                    state.evicted += 1
                    if not block.ref_cnt:
                        state.cached -= 1
                    content = hash_of(key)
                    evictions.pop(content, None)  # so that it is the youngest again
                    evictions[content] = (state.step, clock(), NOBODY)
                    self.just_evicted.append((content, block.block_id))
                    if len(evictions) > REMEMBERED:
                        del evictions[next(iter(evictions))]
                        self.forgotten += 1
                except USERS:
                    raise
                except BaseException as error:
                    self._failed(error)
            return gone

        return _maybe_evict_cached_block

    def _on_touch(self, original: Callable[..., Any]) -> Callable[..., Any]:
        queue, state = self._queue, self.state

        def touch(blocks: Any, *args: Any, **kwargs: Any) -> Any:
            before = self._free_before(queue)
            result = original(blocks, *args, **kwargs)
            try:
                revived = before - queue.num_free_blocks
                reused = self._count(blocks)
                state.reused += reused
                state.revived += revived
                state.cached -= revived
                state.shared += reused - revived
            except USERS:
                raise
            except BaseException as error:
                self._failed(error)
            return result

        return touch

    def _count(self, blocks: Any) -> int:
        """Blocks in a list, or in a list for each group; the null block is none."""
        null = self._null
        count = 0
        for block in blocks:
            if isinstance(block, (list, tuple)):
                count += self._count(block)
            elif block is not null:
                count += 1
        return count

    def _on_free(self, original: Callable[..., Any]) -> Callable[..., Any]:
        queue, null, state = self._queue, self._null, self.state

        def free_blocks(ordered_blocks: Any, *args: Any, **kwargs: Any) -> Any:
            blocks = list(ordered_blocks)  # it may be an iterator, and is looked at twice
            before = self._free_before(queue)
            result = original(blocks, *args, **kwargs)
            try:
                state.freed += queue.num_free_blocks - before
                if self._other_pools:
                    blocks = [b for b in blocks if getattr(b, "pool", None) in (None, self._pool)]
                cached = held = 0
                for block in blocks:
                    if block.ref_cnt:
                        held += block is not null
                    elif block.block_hash is not None:
                        cached += 1
                state.cached += cached
                state.shared -= held
            except USERS:
                raise
            except BaseException as error:
                self._failed(error)
            return result

        return free_blocks

    def _on_reset(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def reset_prefix_cache(*args: Any, **kwargs: Any) -> Any:
            known: list[Any] = []
            with contained(self._failed):
                known = [b.block_hash for b in self._pool.blocks if b.block_hash is not None]
            done = original(*args, **kwargs)
            if done:
                with contained(self._failed):
                    self.state.resets += 1
                    self.state.cached = 0
                    self.evictions.clear()
                    now = clock()
                    for key in known[-REMEMBERED:]:
                        self.evictions[self._hash_of(key)] = (RESET, now, NOBODY)
            return done

        return reset_prefix_cache


#: Stands for the step of an eviction that was a reset of the whole cache.
RESET = -1
