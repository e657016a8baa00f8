"""An engine core that is played: objects with the attributes and methods of vLLM's scheduler, KV cache manager and
block pool that kvhook looks at, and nothing of vLLM. It runs without vLLM, and can be made odd at any place.

It schedules first come, first served, in chunks of a token budget, evicts, preempts the youngest and finds prefixes
again; what it does depends on its seed alone.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from kvhook.adapters.core import EXPRESSIONS, STATES, Core

#: What the adapter would have found on the scheduler below.
READS = {
    "waiting": "len(sched.waiting) + len(sched.skipped_waiting)",
    "skipped": "len(sched.skipped_waiting)",
    "budget": "sched.max_num_scheduled_tokens",
    "places": "sched.max_num_running_reqs",
    "computed": "request.num_computed_tokens",
    "prompt": "request.prompt_token_ids",
}


class Block:
    """As ``KVCacheBlock``."""

    def __init__(self, number: int) -> None:
        self.block_id, self.ref_cnt = number, 0
        self.block_hash: Any = None


class Queue:
    """As ``FreeKVCacheBlockQueue``: free blocks, the one that is used first in front."""

    def __init__(self, blocks: list[Block]) -> None:
        self.blocks = deque(blocks)
        #: makes what others read odd
        self.odd: Callable[[int], Any] = int

    @property
    def num_free_blocks(self) -> Any:
        """How many there are."""
        return self.odd(len(self.blocks))

    def take(self) -> Block:
        """The next free block."""
        return self.blocks.popleft()

    def give(self, block: Block) -> None:
        """A block comes free."""
        self.blocks.append(block)

    def revive(self, block: Block) -> None:
        """A free block is used again as it is."""
        self.blocks.remove(block)


class Pool:
    """As ``BlockPool``."""

    def __init__(self, count: int) -> None:
        self.blocks = [Block(i) for i in range(count)]
        self.null_block, self.num_gpu_blocks = self.blocks[0], count
        self.free_block_queue = Queue(self.blocks[1:])
        self.cached: dict[bytes, Block] = {}

    def get_new_blocks(self, count: int) -> list[Block]:
        """Free blocks, whatever they held is given up."""
        new = []
        for _ in range(count):
            block = self.free_block_queue.take()
            self._maybe_evict_cached_block(block)
            block.ref_cnt = 1
            new.append(block)
        return new

    def _maybe_evict_cached_block(self, block: Block) -> bool:
        if block.block_hash is None:
            return False
        del self.cached[block.block_hash]
        block.block_hash = None
        return True

    def touch(self, blocks: list[Block]) -> None:
        """Blocks that were found are held once more."""
        for block in blocks:
            if not block.ref_cnt:
                self.free_block_queue.revive(block)
            block.ref_cnt += 1

    def free_blocks(self, ordered_blocks: Any) -> None:
        """Blocks are held by one request less."""
        for block in ordered_blocks:
            block.ref_cnt -= 1
            if not block.ref_cnt:
                self.free_block_queue.give(block)

    def cache_full_blocks(
        self, request: Any, blocks: list[Block], num_cached_blocks: int, num_full_blocks: int
    ) -> None:
        """Blocks are full, and can be found from now on."""
        for i in range(num_cached_blocks, num_full_blocks):
            content = request.block_hashes[i]
            if content not in self.cached and blocks[i].block_hash is None:
                blocks[i].block_hash = content
                self.cached[content] = blocks[i]

    def reset_prefix_cache(self) -> bool:
        """Nothing is found any more."""
        for block in self.cached.values():
            block.block_hash = None
        self.cached.clear()
        return True


class Manager:
    """As ``KVCacheManager``."""

    def __init__(self, pool: Pool, size: int) -> None:
        self.block_pool, self.size, self.blocks = pool, size, dict[str, list[Block]]()
        self.num_cached: dict[str, int] = {}

    def get_computed_blocks(self, request: Any) -> tuple[list[Block], int]:
        """Cached blocks of the request's beginning, and their tokens."""
        found = []
        for content in request.block_hashes[: (request.num_tokens - 1) // self.size]:
            if content not in self.block_pool.cached:
                break
            found.append(self.block_pool.cached[content])
        return found, len(found) * self.size

    def allocate_slots(self, request: Any, tokens: int, found: list[Block] | None = None) -> list[Block] | None:
        """Blocks for so many more tokens; None if there are not enough."""
        pool, mine = self.block_pool, self.blocks.get(request.request_id, [])
        found = found or []
        end = request.num_computed_tokens + len(found) * self.size + tokens
        more = -(-end // self.size) - len(mine) - len(found)
        if more > len(pool.free_block_queue.blocks) - sum(1 for b in found if not b.ref_cnt):
            return None
        if found:
            pool.touch(found)
        new = pool.get_new_blocks(more) if more > 0 else []
        self.blocks[request.request_id] = mine + found + new
        cached, full = self.num_cached.get(request.request_id, 0), min(end, request.num_tokens) // self.size
        if cached < full:
            pool.cache_full_blocks(request, self.blocks[request.request_id], cached, full)
            self.num_cached[request.request_id] = full
        return new

    def free(self, request: Any) -> None:
        """The request gives its blocks back."""
        self.num_cached.pop(request.request_id, None)
        self.block_pool.free_blocks(reversed(self.blocks.pop(request.request_id, [])))


class Request:
    """As ``Request``."""

    def __init__(self, name: str, prompt: list[int], most: int, size: int) -> None:
        self.request_id, self.tokens, self.most, self._size = name, list(prompt), most, size
        self.num_prompt_tokens, self.num_computed_tokens, self.prompt_token_ids = len(prompt), 0, list(prompt)
        self.status = SimpleNamespace(name="WAITING")

    @property
    def num_tokens(self) -> int:
        """Of prompt and output."""
        return len(self.tokens)

    @property
    def num_output_tokens(self) -> int:
        """Of the output."""
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def block_hashes(self) -> list[bytes]:
        """One for each full block."""
        return [repr(self.tokens[: i + self._size]).encode() for i in range(0, len(self.tokens), self._size)][
            : len(self.tokens) // self._size
        ]

    def get_finished_reason(self) -> int:
        """Length."""
        return 1


class Output:
    """As ``SchedulerOutput``."""

    def __init__(self) -> None:
        self.num_scheduled_tokens: Any = {}
        self.total_num_scheduled_tokens: Any = 0
        self.scheduled_spec_decode_tokens: Any = {}
        self.scheduled_new_reqs: Any = []
        self.scheduled_cached_reqs: Any = []
        #: what vLLM goes by, whatever becomes of the others
        self.tokens: dict[str, int] = self.num_scheduled_tokens


class NewRequest:
    """As ``NewRequestData``."""

    def __init__(self, request: Request, blocks: list[Block]) -> None:
        self.req_id, self.block_ids = request.request_id, ([b.block_id for b in blocks],)


class Scheduler:
    """As ``Scheduler``."""

    def __init__(self, seed: int, blocks: int, size: int, places: int, budget: int) -> None:
        self.random = random.Random(seed)
        self.kv_cache_manager, self.size = Manager(Pool(blocks), size), size
        self.max_num_running_reqs, self.max_num_scheduled_tokens = places, budget
        self.places, self.budget = places, budget
        self.waiting: Any = deque()
        self.skipped_waiting: Any = deque()
        self.running: Any = []
        self.requests: dict[str, Request] = {}
        self.stats_wanted = True

    def add_request(self, request: Request) -> None:
        """It waits."""
        self.requests[request.request_id] = request
        self.waiting.append(request)

    def schedule(self) -> Output:
        """Running ones first, then those that wait."""
        output, left, manager, preempted = Output(), self.budget, self.kv_cache_manager, False
        for request in list(self.running):
            if request not in self.running:
                continue
            tokens = min(request.num_tokens - request.num_computed_tokens, left)
            while tokens > 0 and request in self.running and manager.allocate_slots(request, tokens) is None:
                victim = self.running[-1]
                self._preempt_request(victim, 0.0)
                preempted = True
                left += output.num_scheduled_tokens.pop(victim.request_id, 0)
            if tokens > 0 and request in self.running:
                output.num_scheduled_tokens[request.request_id] = tokens
                left -= tokens
        while not preempted and self.waiting and left and len(self.running) < self.places:
            request = self.waiting[0]
            found, count = manager.get_computed_blocks(request)
            tokens = min(request.num_tokens - count, left)
            if manager.allocate_slots(request, tokens, found) is None:
                break
            self.waiting.popleft()
            self.running.append(request)
            request.num_computed_tokens = count
            output.num_scheduled_tokens[request.request_id] = tokens
            if request.num_output_tokens == 0:
                output.scheduled_new_reqs.append(NewRequest(request, manager.blocks[request.request_id]))
            left -= tokens
        output.total_num_scheduled_tokens = sum(output.num_scheduled_tokens.values())
        for name, tokens in output.num_scheduled_tokens.items():
            self.requests[name].num_computed_tokens += tokens
        return output

    def _preempt_request(self, request: Request, when: float) -> None:
        self.running.remove(request)
        self.kv_cache_manager.free(request)
        request.num_computed_tokens = 0
        self.waiting.appendleft(request)

    def update_from_output(self, scheduler_output: Output, sampled: Any = None) -> Any:
        """Each request whose tokens are all computed gets one more; some end."""
        for name in scheduler_output.tokens:
            request = self.requests.get(name)
            if request is None or request.num_computed_tokens < request.num_tokens:
                continue
            request.tokens.append(self.random.randrange(100))
            if request.num_output_tokens >= request.most:
                self.running.remove(request)
                self._free_request(request)
        return self.make_stats()

    def make_stats(self) -> Any:
        """Some, where they are wanted."""
        return object() if self.stats_wanted else None

    def _free_request(self, request: Request) -> None:
        self.kv_cache_manager.free(request)
        del self.requests[request.request_id]


def core_of(sched: Any) -> Core:
    """What the adapter would find."""
    pool = sched.kv_cache_manager.block_pool
    found = {"sched": sched, "manager": sched.kv_cache_manager, "pool": pool, "queue": pool.free_block_queue}
    expressions = {**READS, **EXPRESSIONS}
    reads: dict[str, Any] = {
        name: eval(f"lambda request=None: {expression}", dict(found)) for name, expression in READS.items()
    }
    reads["states"] = eval(f"lambda: ({', '.join(expressions[name] for name in STATES)})", dict(found))
    reads["hashes"] = lambda request: request.block_hashes
    reads["queues"] = lambda: (sched.skipped_waiting, sched.waiting)
    reads["hash_of_request"] = reads["hash_of_block"] = lambda content: content
    reads["group_of_block"] = lambda content: 0
    reads["new_blocks"] = lambda output: [(new.req_id, new.block_ids) for new in output.scheduled_new_reqs]
    facts = {
        "num_kv_blocks": pool.num_gpu_blocks - 1,
        "block_size": sched.size,
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
        "connector": "",
        "lora": False,
        "kv_groups": [{"kind": "FullAttentionSpec"}],
    }
    return Core(
        sched,
        found["manager"],
        pool,
        found["queue"],
        reads,
        expressions,
        facts,
        {},
        (),
        "_preempt_request",
    )
