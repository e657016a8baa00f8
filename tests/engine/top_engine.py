"""Run by test_top_in_tmux.py: an engine that does what it is told on standard input, and answers with what it did.

Arguments: the model. A line of ``work`` sends prompts and waits for them, ``keep`` sends some that take their time.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import kvhook
from tests.engine import vllm_here
from tests.workloads import SMALL

#: Requests of ``keep``, and the tokens of each.
KEPT, LONG = 3, 900
PROMPTS = [[5 + i % 300 for i in range(70 + 32 * n)] for n in range(4)]


def main() -> None:
    kvhook.install()
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found, unused-ignore]

    vllm_here.stand_numba()
    llm: Any = LLM(model=sys.argv[1], **SMALL | {"num_gpu_blocks_override": 120})
    engine, steps = llm.llm_engine, 0
    step = engine.step

    def counted() -> Any:
        nonlocal steps
        steps += 1
        return step()

    engine.step = counted
    pool = engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    finished = prompt_tokens = cached_tokens = 0
    print(json.dumps({"pid": os.getpid()}), flush=True)
    for line in sys.stdin:
        if line.strip() == "work":
            for prompt in PROMPTS:  # one after the other, so that each finds what those before it have left
                params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=8)
                (one,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
                finished += 1
                prompt_tokens += len(one.prompt_token_ids)
                cached_tokens += one.num_cached_tokens
        else:
            params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=LONG)
            kept = [{"prompt_token_ids": [7 + n, *PROMPTS[n]]} for n in range(KEPT)]
            llm.generate(kept, params, use_tqdm=False)
            finished += KEPT
        held = [block for block in pool.blocks if block.block_hash is not None and not block.ref_cnt]
        answer: dict[str, float] = {
            "finished": finished,
            "steps": steps,
            "cached blocks": len(held),
            "blocks": len(pool.blocks) - 1,
        }
        answer |= {"hit rate": cached_tokens / prompt_tokens if prompt_tokens else 0.0}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
