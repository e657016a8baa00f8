"""What a test reads from vLLM's own objects in each step, to be compared with what kvhook recorded there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.core.scheduler_here import Driver


def kinds_of_tokens(scheduler: Any, scheduled: Mapping[str, int], computed: Mapping[str, int]) -> dict[str, int]:
    """The tokens of a batch, position by position: computed before and lost, part of the prompt, or generated.

    Args:
        scheduler: has just put the batch together.
        scheduled: request id -> tokens of the batch.
        computed: request id -> how many of its tokens had been computed when it was preempted.
    """
    found = {"num_prefill_tokens": 0, "num_recomputed_tokens": 0, "num_decode_tokens": 0}
    for name, count in scheduled.items():
        request = scheduler.requests[name]
        for position in range(request.num_computed_tokens - count, request.num_computed_tokens):
            if position < computed.get(name, 0):
                found["num_recomputed_tokens"] += 1
            elif position < request.num_prompt_tokens:
                found["num_prefill_tokens"] += 1
            else:
                found["num_decode_tokens"] += 1
    return found


class Books:
    """Reads the scheduler and the block pool of a `Driver` around each ``schedule`` and ``update``, block by block.

    Args:
        driver: what is looked at.
        plain: whether there is one KV group, of full attention.
    """

    def __init__(self, driver: Driver, plain: bool = True) -> None:
        self.driver, self.rows = driver, list[dict[str, Any]]()
        #: whether a block holds the tokens of its place in a request
        self.plain = plain
        self._computed: dict[str, int] = {}

    def step(self) -> Any:
        """One step of the driver, and a row of what was seen."""
        driver = self.driver
        refs = self._refs()
        running = {r.request_id: r for r in driver.scheduler.running}
        before = {name: r.num_computed_tokens for name, r in running.items()}
        output = driver.schedule()
        row = self._scheduled(output, refs, before)
        driver.update(output)
        row["num_kv_blocks_used"] = sum(1 for b in self._usable() if b.ref_cnt)
        self.rows.append(row)
        return output

    def run(self, most: int = 100_000) -> None:
        """Steps until nothing is left to be done."""
        for _ in range(most):
            if not self.driver.scheduler.has_unfinished_requests():
                return
            self.step()
        raise AssertionError("the scheduler does not come to an end")

    def _usable(self) -> list[Any]:
        return [b for b in self.driver.pool.blocks if b is not self.driver.pool.null_block]

    def _refs(self) -> dict[int, int]:
        return {b.block_id: b.ref_cnt for b in self._usable()}

    def _scheduled(self, output: Any, refs: dict[int, int], before: dict[str, int]) -> dict[str, Any]:
        scheduler = self.driver.scheduler
        tokens = output.num_scheduled_tokens
        preempted = [name for name in before if name not in {r.request_id for r in scheduler.running}]
        for name in preempted:
            self._computed[name] = max(self._computed.get(name, 0), before[name])
        used = [b for b in self._usable() if b.ref_cnt]
        free = [b for b in self._usable() if not b.ref_cnt]
        return {
            "num_scheduled_tokens": sum(tokens.values()),
            **kinds_of_tokens(scheduler, tokens, self._computed),
            "num_scheduled_reqs": len(tokens),
            "num_preempted_reqs": len(preempted),
            "num_running_reqs": len(scheduler.running),
            "num_waiting_reqs": sum(scheduler.get_request_counts()) - len(scheduler.running)
            if hasattr(scheduler, "get_request_counts")
            else len(scheduler.waiting),
            "num_kv_blocks_peak": len(used),
            "num_kv_blocks_cached": sum(1 for b in free if b.block_hash is not None),
            "num_kv_blocks_empty": sum(1 for b in free if b.block_hash is None),
            "num_kv_tokens": self._tokens_held(used) if self.plain else -1,
        }

    def _tokens_held(self, used: list[Any]) -> int:
        """Token by token: the positions that a block holds, once for each block however many requests share it."""
        manager = self.driver.scheduler.kv_cache_manager
        held: dict[int, int] = {}
        for request in self.driver.scheduler.running:
            blocks = manager.get_block_ids(request.request_id)
            blocks = blocks[0] if blocks and isinstance(blocks[0], (list, tuple)) else blocks
            for i, block in enumerate(blocks):
                size = self.driver.block_size
                tokens = min(size, max(0, request.num_computed_tokens - i * size))
                held[block] = max(held.get(block, 0), tokens)
        assert set(held) <= {b.block_id for b in used}
        return sum(held.values())
