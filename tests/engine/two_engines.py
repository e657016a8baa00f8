"""Run by test_two_engines.py: two engines of `LLM` in one process, which work in turn.

Arguments: the model, the trace, and a file for what came back.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import kvhook
from tests.engine import vllm_here
from tests.workloads import SMALL

#: Blocks of each, which tell their cores apart: one of them is the null block.
BLOCKS = (60, 40)


def prompts(engine: int, call: int) -> list[list[int]]:
    """Those of the second engine begin with 64 tokens, which only its later calls find."""
    shared = [3 + i % 90 for i in range(64)] if engine else []
    return [shared + [100 + (n * 37 + i * (1 + call)) % 400 for i in range(33 + n)] for n in range(2 + engine)]


def main() -> None:
    model, trace, results = sys.argv[1:]
    session = kvhook.install(trace=trace)
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found, unused-ignore]

    vllm_here.stand_numba()
    llms: list[Any] = []
    for blocks in BLOCKS:
        llms.append(LLM(model=model, **SMALL | {"num_gpu_blocks_override": blocks}))
        gc.freeze()
    done: list[list[Any]] = [[], []]
    for call in range(3):
        for engine, llm in enumerate(llms):
            params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=4 + 3 * engine + call)
            asked = [{"prompt_token_ids": prompt} for prompt in prompts(engine, call)]
            for one in llm.generate(asked, params, use_tqdm=False):
                tokens = len(one.prompt_token_ids), len(one.outputs[0].token_ids), one.num_cached_tokens or 0
                done[engine].append(tokens)
    so_far = [session.summary(engine) for engine in (None, 0, 1)]
    Path(results).write_text(
        json.dumps(
            {
                "done": done,
                "faults": session.faults,
                "generated so far": [s.num_generation_tokens for s in so_far],
                "cores so far": [s.core.num_cores if s.core is not None else None for s in so_far],
            }
        )
    )


if __name__ == "__main__":
    main()
