"""A real engine that generates until it is killed, and keeps a record of its own of what kvhook was given.

    python killed.py MODEL TRACE WITNESS

WITNESS is a mapped file: a word with the number of rows, then rows of (t_start_ns, t_end_ns, tokens, usage), a row
for each step whose publish has returned. The count is moved when the row is there.
"""

from __future__ import annotations

import mmap
import os
import random
import struct
import sys
from typing import Any

ROW = struct.Struct("<qqqd")
MOST = 100_000
RUNNING = 12


def main(model: str, trace: str, witness: str) -> None:
    import kvhook

    kvhook.install(trace=trace)
    from vllm import LLM, SamplingParams

    from kvhook.hooks.registry import registry
    from tests.workloads import SMALL, tokens

    llm = LLM(model=model, **SMALL)
    engine: Any = llm.llm_engine
    with open(witness, "w+b") as file:
        os.posix_fallocate(file.fileno(), 0, 8 + ROW.size * MOST)
        memory = mmap.mmap(file.fileno(), 8 + ROW.size * MOST)
    words = memoryview(memory)[:8].cast("Q")
    given: dict[str, Any] = {"tokens": 0, "usage": float("nan")}
    record, publish = engine.logger_manager.record, registry.steps[id(engine)]

    def see(*args: Any, **kwargs: Any) -> Any:
        scheduler, iteration = kwargs["scheduler_stats"], kwargs["iteration_stats"]
        given["tokens"] = iteration.num_generation_tokens if iteration is not None else 0
        given["usage"] = scheduler.kv_cache_usage if scheduler is not None else float("nan")
        return record(*args, **kwargs)

    def publish_and_tell(start: int, end: int) -> None:
        publish(start, end)
        n = words[0]
        at = 8 + ROW.size * n
        memory[at : at + ROW.size] = ROW.pack(start, end, given["tokens"], given["usage"])
        words[0] = n + 1
        given.update(tokens=0, usage=float("nan"))

    engine.logger_manager.record = see
    registry.steps[id(engine)] = publish_and_tell
    rng = random.Random(1)
    sent = 0
    while True:
        # there is never a moment at which nothing runs
        while engine.get_num_unfinished_requests() < RUNNING:
            prompt = {"prompt_token_ids": tokens(rng, rng.randrange(20, 120))}
            params = SamplingParams(max_tokens=rng.randrange(20, 100), ignore_eos=True)
            engine.add_request(str(sent), prompt, params)
            sent += 1
        engine.step()


if __name__ == "__main__":
    main(*sys.argv[1:])
