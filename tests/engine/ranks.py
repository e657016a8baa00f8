"""Run by test_core_ranks.py: an AsyncLLM with two data-parallel ranks, each in a process of its own.

Arguments: the model, and a file for the results.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import kvhook
from kvhook.errors import KvhookError

REQUESTS = 24


async def generate(engine: Any, number: int) -> tuple[str, int, list[int]]:
    """One request: its id, the length of its prompt, and the tokens that came back."""
    from vllm import SamplingParams

    prompt = [7 + (number * 31 + i * (1 + number % 5)) % 400 for i in range(40 + 5 * number)]
    name, tokens = f"request-{number}", list[int]()
    params = SamplingParams(max_tokens=5 + number % 7, ignore_eos=True, temperature=0, detokenize=False)
    async for output in engine.generate({"prompt_token_ids": prompt}, params, name):
        tokens = list(output.outputs[0].token_ids)
    return name, len(prompt), tokens


def why_no_peaks(session: kvhook.Session) -> str:
    """Why the front end's steps have no peaks; "" if they have."""
    try:
        session.steps(columns=["num_kv_blocks_peak"])
    except KvhookError as error:
        return str(error)
    return ""


async def work(model: str, session: kvhook.Session) -> tuple[list[tuple[str, int, list[int]]], dict[str, Any]]:
    """All requests at a time, and what kvhook says while the engine is there."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = AsyncEngineArgs(
        model=model,
        data_parallel_size=2,
        enforce_eager=True,
        block_size=32,
        num_gpu_blocks_override=30,
        max_num_seqs=8,
        max_model_len=512,
    )
    engine = AsyncLLM.from_engine_args(arguments)
    try:
        done = await asyncio.gather(*(generate(engine, number) for number in range(REQUESTS)))
        cores, steps = session.cores(), session.steps()
        joined = [
            n for n in ("num_kv_blocks_peak", "engine_index", "has_scheduler_stats") if n in (steps.dtype.names or ())
        ]
        said: dict[str, Any] = {
            "facts": cores.facts,
            "why none": cores.why_none,
            "lost": cores.lost,
            "requests": [
                cores.requests(core)[["request_key", "num_prompt_tokens", "num_generation_tokens"]].tolist()
                for core in range(len(cores))
            ],
            "tokens": [cores.steps(core)["num_scheduled_tokens"].tolist() for core in range(len(cores))],
            "peaks": [cores.steps(core)["num_kv_blocks_peak"].tolist() for core in range(len(cores))],
            "front": {name: steps[name].tolist() for name in joined},
            "keys": {name: session.request_key(name) for name, _, _ in done},
            "faults": session.faults,
            "why no peaks": why_no_peaks(session),
        }
    finally:
        engine.shutdown()
    return done, said


def main() -> None:
    model, results = sys.argv[1:]
    session = kvhook.install(trace=Path(results).with_suffix(".kvh"))
    done, said = asyncio.run(work(model, session))
    kvhook.uninstall()
    Path(results).write_text(json.dumps({"done": done, "pid": os.getpid(), **said}))


if __name__ == "__main__":
    main()
