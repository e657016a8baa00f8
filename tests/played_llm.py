"""An LLM over the vLLM that plays a script: it answers prompts, and its stats are computed by hand from them."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

from tests.standin import FakeVllm, step_stats

BLOCK_SIZE = 32
BLOCKS = 257


def _prompt_stats(total: int, cached: int) -> dict[str, int]:
    return {"total": total, "computed": total - cached, "cached_tokens": cached, "local_cache_hit": cached}


class PlayedLLM:
    """All prompts of a call are computed in its first step, each step after it gives every request a token.

    What it tells kvhook can be made wrong: `lie` is called with the stats of each step before they are told.

    Attributes:
        truth: the totals so far.
    """

    def __init__(self, vllm: FakeVllm) -> None:
        sys.modules["vllm"].SamplingParams = types.SimpleNamespace  # type: ignore[attr-defined]
        self.llm_engine = vllm.engine(log_stats=True, num_gpu_blocks=BLOCKS, block_size=BLOCK_SIZE)
        self.lie: Callable[[dict[str, Any]], None] = lambda told: None
        self.truth: dict[str, float] = dict.fromkeys(
            ("prefix_cache_queries", "prefix_cache_hits", "num_prompt_tokens", "num_generation_tokens"), 0
        )
        self.truth |= {"num_preempted_reqs": 0, "num_finished_reqs": 0}
        self.truth |= {"num_running_reqs": 0, "num_waiting_reqs": 0, "kv_cache_usage": 0.0}
        self.ttft: list[float] = []
        #: usage = (blocks + reserved) / of, as kvhook has it of this release
        self.of, self.reserved = BLOCKS, 0
        self._cached: set[tuple[int, ...]] = set()

    def get_tokenizer(self) -> Any:
        return types.SimpleNamespace(encode=lambda text: list(text.encode()))

    def generate(self, prompts: list[dict[str, list[int]]], params: Any, use_tqdm: bool) -> list[Any]:
        sent = [p["prompt_token_ids"] for p in prompts]
        hits = [self._look_up(prompt) for prompt in sent]
        for n in range(params.max_tokens):
            last = n == params.max_tokens - 1
            held = 0 if last else sum(-(-(len(prompt) + n) // BLOCK_SIZE) for prompt in sent)
            told: dict[str, Any] = {
                "prefix": {"queries": 0 if n else sum(map(len, sent)), "hits": 0 if n else sum(hits)},
                "prompt": {} if n else _prompt_stats(sum(map(len, sent)), sum(hits)),
                "generated": len(sent),
                "ttft": [] if n else [0.5] * len(sent),
                "finished": [
                    {
                        "request_id": f"{i}",
                        "e2e_latency": 1.0,
                        "num_prompt_tokens": len(prompt),
                        "num_cached_tokens": hits[i],
                        "num_generation_tokens": params.max_tokens,
                    }
                    for i, prompt in enumerate(sent if last else [])
                ],
                "kv_cache_usage": (held + self.reserved) / self.of,
                "num_running_reqs": 0 if last else len(sent),
            }
            self._count(told)
            self.lie(told)
            self.llm_engine.plan.append(step_stats(**told))
            self.llm_engine.step()
        answer = types.SimpleNamespace(token_ids=[0] * params.max_tokens)
        return [types.SimpleNamespace(outputs=[answer]) for _ in sent]

    def _look_up(self, prompt: list[int]) -> int:
        found = 0
        for end in range(BLOCK_SIZE, len(prompt), BLOCK_SIZE):
            if tuple(prompt[:end]) not in self._cached:
                break
            found = end
        self._cached.update(tuple(prompt[:end]) for end in range(BLOCK_SIZE, len(prompt) + 1, BLOCK_SIZE))
        return found

    def _count(self, told: dict[str, Any]) -> None:
        self.truth["prefix_cache_queries"] += told["prefix"]["queries"]
        self.truth["prefix_cache_hits"] += told["prefix"]["hits"]
        self.truth["num_prompt_tokens"] += told["prompt"].get("total", 0)
        self.truth["num_generation_tokens"] += told["generated"]
        self.truth["num_finished_reqs"] += len(told["finished"])
        self.truth["kv_cache_usage"] = told["kv_cache_usage"]
        self.ttft += told["ttft"]
