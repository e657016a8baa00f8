"""Look-ups in the prefix cache: what a request found when it was about to be scheduled, and why not more."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, Any

from kvhook.core.beginnings import Beginnings
from kvhook.core.lives import NO_MISS, Life, Miss
from kvhook.core.pool import RESET, PoolAccount
from kvhook.core_schema import MISS_REASONS
from kvhook.faults import contained

if TYPE_CHECKING:
    from kvhook.adapters.core import Core
    from kvhook.core.taps import Taps

clock = time.monotonic_ns

_REASON = {name: code for code, name in enumerate(MISS_REASONS)}


class Lookups:
    """Follows ``KVCacheManager.get_computed_blocks``, which is called for a request that is first in line, in each step
    until it can be scheduled; and the call of ``allocate_slots`` behind it, which says whether it got blocks.

    Attributes:
        attempted: the request that was looked up last in the ``schedule`` under way, if any.
        refused: whether there were no blocks for it.
    """

    def __init__(self, core: Core, pool: PoolAccount, life_of: Callable[[Any], Life]) -> None:
        self._core, self._pool, self._life_of = core, pool, life_of
        self._hashes, self._hash_of = core.reads["hashes"], core.reads["hash_of_request"]
        self._prompt = core.reads["prompt"]
        self._block_size: int = core.facts["block_size"]
        self._caching: bool = core.facts["enable_prefix_caching"]
        self._one_group = len(core.facts["kv_groups"]) <= 1
        self._state = pool.state
        #: look-ups in all
        self._seen = 0
        self._beginnings = Beginnings()
        self.attempted: Any = None
        self.refused = False
        self._failed: Callable[[BaseException], None] = lambda _: None

    def tap(self, taps: Taps, failed: Callable[[BaseException], None]) -> None:
        """Put the counting in place."""
        self._failed = failed
        manager = self._core.manager
        taps.put(manager, "get_computed_blocks", self._on_get_computed_blocks)
        if callable(getattr(manager, "get_computed_blocks_for_connector", None)):
            taps.put(manager, "get_computed_blocks_for_connector", self._on_lookup_for_connector)

    def begin(self) -> None:
        """A ``schedule`` begins, after one in which a request was looked up."""
        self.attempted, self.refused, self._state.looked = None, False, False

    def end(self) -> None:
        """It has been scheduled: what waited for an ``allocate_slots`` that never came is taken out."""
        self._take_out_probe()

    def admitted(self, life: Life) -> None:
        """The request was scheduled with what it had found."""
        miss = life.miss
        if miss.reason == _REASON["evicted"]:
            by = miss.by
            if miss.steps == 0:  # the block was evicted in this very step: only now it is known for whom
                by = self._pool.evictions.get(self._content(life.request, miss.block), (0, 0, -1))[2]
            life.miss = miss._replace(by=by, evicted_tokens=self._evicted_from(life.request, miss.block))
        if miss.reason != _REASON["not_looked_up"]:
            self._state.looked_up += life.looked_up
            self._state.found += life.found

    def _evicted_from(self, request: Any, block: int) -> int:
        """Tokens of the blocks of a request, from this one on, that had been cached and were evicted."""
        evictions, hash_of, size = self._pool.evictions, self._hash_of, self._block_size
        tokens = 0
        for content in islice(self._hashes(request), block, (request.num_tokens - 1) // size):
            if hash_of(content) not in evictions:
                break
            tokens += size
        return tokens

    # ---- the look-up -----------------------------------------------------------------------------------------------

    def _on_get_computed_blocks(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def get_computed_blocks(request: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(request, *args, **kwargs)
            with contained(self._failed):
                self._looked_up(request, int(result[1]))
            return result

        return get_computed_blocks

    def _on_lookup_for_connector(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """From 0.27, with a KV connector: in most cases it calls ``get_computed_blocks``."""

        def get_computed_blocks_for_connector(request: Any, *args: Any, **kwargs: Any) -> Any:
            before = self._seen
            result = original(request, *args, **kwargs)
            with contained(self._failed):
                if self._seen == before:
                    self._looked_up(request, int(result[1]))
            return result

        return get_computed_blocks_for_connector

    def _looked_up(self, request: Any, found: int) -> None:
        self._seen += 1
        life = self._life_of(request)
        life.t_looked_up = clock()
        life.tries += 1
        life.looked_up, life.found = request.num_tokens, found
        if life.shared < 0:
            life.shared = self._beginnings.shared(self._prompt(request))
        life.miss = self._miss(request, found, life.t_looked_up)
        self._state.lookups += life.miss.reason != _REASON["not_looked_up"]
        self.attempted, self.refused, self._state.looked = request, False, True
        self._put_probe()

    def _miss(self, request: Any, found: int, now: int) -> Miss:
        """Why no more was found; what evictions cost is counted when the request is admitted."""
        if not self._caching or getattr(request, "skip_reading_prefix_cache", False) or _wants_logprobs(request):
            return Miss(_REASON["not_looked_up"])
        size = self._block_size
        most = (request.num_tokens - 1) // size  # the last token is computed in any case
        block = found // size
        if not most:
            return Miss(_REASON["short"], 0)
        if block >= most:
            return NO_MISS
        if not self._one_group:
            return Miss(_REASON["unknown"], block)
        hashes = self._hashes(request)
        if block >= len(hashes):
            return Miss(_REASON["unknown"], block)
        evicted = self._pool.evictions.get(self._content(request, block))
        if evicted is not None:
            step, when, by = evicted
            if step == RESET:
                return Miss(_REASON["reset"], block, -1, now - when)
            return Miss(_REASON["evicted"], block, self._state.step - step, now - when, by)
        return Miss(_REASON[_unseen(request, block)], block)

    def _content(self, request: Any, block: int) -> Any:
        """What a block of a request holds, as the key of `PoolAccount.evictions`."""
        return self._hash_of(self._hashes(request)[block])

    # ---- whether there were blocks for it --------------------------------------------------------------------------

    def _put_probe(self) -> None:
        """Look on at the next call of ``allocate_slots``, and at no other: it is called for each running request."""
        manager = self._core.manager
        there = vars(manager).get("allocate_slots")
        if getattr(there, "kvhook_probe", False):
            return  # from a look-up whose request was skipped
        allocate_slots = manager.allocate_slots

        def probe(*args: Any, **kwargs: Any) -> Any:
            with contained(self._failed):
                self._take_out_probe()
            blocks = allocate_slots(*args, **kwargs)
            self.refused = blocks is None
            return blocks

        probe.kvhook_probe, probe.kvhook_there = True, there  # type: ignore[attr-defined]
        manager.allocate_slots = probe

    def _take_out_probe(self) -> None:
        manager = self._core.manager
        probe: Any = vars(manager).get("allocate_slots")
        if getattr(probe, "kvhook_probe", False):
            if probe.kvhook_there is None:
                del manager.allocate_slots
            else:
                manager.allocate_slots = probe.kvhook_there


def _wants_logprobs(request: Any) -> bool:
    """Up to 0.11 a request that wants its prompt's logprobs is not looked up, and says so nowhere else."""
    params = getattr(request, "sampling_params", None)
    return not hasattr(request, "skip_reading_prefix_cache") and getattr(params, "prompt_logprobs", None) is not None


def _unseen(request: Any, block: int) -> str:
    """A block whose content was never in the cache: what is it about this request?"""
    if block:
        return "diverged"
    if getattr(request, "cache_salt", None):
        return "salted"
    return "lora" if getattr(request, "lora_request", None) is not None else "never_seen"
