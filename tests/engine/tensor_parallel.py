"""Run by test_tensor_parallel.py: one engine over two GPUs, its core in a process of its own.

Arguments: the model, and a file for the results.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import kvhook

REQUESTS = 24


def main() -> None:
    model, results = sys.argv[1:]
    session = kvhook.install(trace=Path(results).with_suffix(".kvh"))
    from vllm import LLM, SamplingParams

    llm: Any = LLM(
        model=model,
        tensor_parallel_size=2,
        enforce_eager=True,
        block_size=32,
        num_gpu_blocks_override=60,
        max_num_seqs=8,
        max_model_len=512,
        gpu_memory_utilization=0.15,
    )
    prompts = [[7 + (n * 31 + i * (1 + n % 5)) % 400 for i in range(40 + 5 * n)] for n in range(REQUESTS)]
    params = [SamplingParams(max_tokens=5 + n % 7, ignore_eos=True, temperature=0) for n in range(REQUESTS)]
    done = llm.generate([{"prompt_token_ids": p} for p in prompts], params)
    steps, requests, cores = session.steps(), session.requests(), session.cores()
    Path(results).write_text(
        json.dumps(
            {
                "prompts": [len(o.prompt_token_ids) for o in done],
                "generated": [len(o.outputs[0].token_ids) for o in done],
                "cached": [o.num_cached_tokens for o in done],
                "engines": [e["engine"] for e in session.meta["engines"]],
                "index": sorted(set(steps["engine_index"].tolist()))
                if "engine_index" in (steps.dtype.names or ())
                else [0],
                "sums": {
                    name: int(steps[name].sum())
                    for name in ("num_prompt_tokens", "num_generation_tokens", "prefix_cache_hits")
                },
                "requests": len(requests),
                "cores": len(cores),
                "why none": cores.why_none,
                "lost": cores.lost,
                "scheduled": int(cores.steps()["num_scheduled_tokens"].sum()),
                "lives": sorted(cores.requests()["num_generation_tokens"].tolist()),
                "faults": session.faults,
            }
        )
    )


if __name__ == "__main__":
    main()
