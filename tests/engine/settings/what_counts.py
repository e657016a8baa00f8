"""What a release counts as a look-up into the prefix cache: one workload under pressure, read on the engine core.

    python -m tests.engine.settings.what_counts [MODEL]

Prints a row of the table in `tests/engines/README.md`. kvhook has no part in it.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
from pathlib import Path
from random import Random
from typing import Any

from tests.engine import vllm_here
from tests.engine.settings.cases import VOCABULARY
from tests.engine.settings.drive import sampling

REQUESTS, PROMPT_TOKENS = 23, 4992
OPTIONS: dict[str, Any] = {
    "enforce_eager": True,
    "dtype": "bfloat16",
    "block_size": 128,
    "num_gpu_blocks_override": 16,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 24,
    "max_model_len": 1024,
    "seed": 0,
    "disable_log_stats": False,
}
HEADINGS = (
    "vLLM",
    "preemptions",
    "first look-ups",
    "their tokens",
    "found",
    "again while waiting",
    "their tokens",
    "found",
    "after a preemption",
    "their tokens",
    "found",
    "counted requests",
    "queries",
    "hits",
    "preempted requests",
    "queries",
    "hits",
)


@dataclasses.dataclass
class LookUps:
    """A kind of look-ups: how many, the tokens asked for, and those found."""

    count: int = 0
    tokens: int = 0
    found: int = 0

    def add(self, tokens: int, found: int) -> None:
        self.count, self.tokens, self.found = self.count + 1, self.tokens + tokens, self.found + found


def prompts() -> list[list[int]]:
    """Random lengths with the sum above. A third of them share a beginning of two blocks."""
    rng = Random(8)
    lengths = [rng.randrange(60, 380) for _ in range(REQUESTS)]
    while sum(lengths) != PROMPT_TOKENS:
        lengths[rng.randrange(REQUESTS)] += 1 if sum(lengths) < PROMPT_TOKENS else -1
    shared = [rng.randrange(2, VOCABULARY) for _ in range(256)]
    found = []
    for i, length in enumerate(lengths):
        own = [rng.randrange(2, VOCABULARY) for _ in range(length)]
        found.append((shared + own)[:length] if i % 3 == 0 else own)
    return found


def main(model: str) -> None:
    from vllm import LLM  # type: ignore[import-not-found, unused-ignore]

    llm = LLM(model=model, **OPTIONS)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    manager = scheduler.kv_cache_manager
    look_up, make_stats = manager.get_computed_blocks, scheduler.make_stats
    first, again, returned = LookUps(), LookUps(), LookUps()
    known: set[str] = set()
    counted = dict.fromkeys(
        ("requests", "queries", "hits", "preempted_requests", "preempted_queries", "preempted_hits"), 0
    )
    preempted: list[int] = []

    def looked_up(request: Any) -> Any:
        found = look_up(request)
        kind = returned if request.status.name == "PREEMPTED" else again if request.request_id in known else first
        known.add(request.request_id)
        kind.add(request.num_tokens, found[1])
        return found

    def made(*args: Any, **kwargs: Any) -> Any:
        stats = make_stats(*args, **kwargs)
        for name in counted:
            counted[name] += getattr(stats.prefix_cache_stats, name, 0)
        return stats

    update = scheduler.update_from_output

    def updated(*args: Any, **kwargs: Any) -> Any:
        by_client = update(*args, **kwargs)
        for outputs in by_client.values():
            for one in outputs.outputs:
                preempted.extend(1 for event in one.events or () if event.type.name == "PREEMPTED")
        return by_client

    manager.get_computed_blocks, scheduler.make_stats = looked_up, made
    scheduler.update_from_output = updated
    params = sampling({"max_tokens": 60, "temperature": 0, "ignore_eos": True})
    llm.generate([{"prompt_token_ids": prompt} for prompt in prompts()], params, use_tqdm=False)
    if not hasattr(make_stats(), "prefix_cache_stats"):
        raise AssertionError("no stats")
    told: list[Any] = [vllm_here.facts().release, sum(preempted)]
    for kind in (first, again, returned):
        told += [kind.count, kind.tokens, kind.found]
    told += list(counted.values())
    print("| " + " | ".join(f"{n:,}" if isinstance(n, int) else str(n) for n in told) + " |")


if __name__ == "__main__":
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", vllm_here.no_binding())
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        from kvhook.demo.model import make_tiny_model

        with tempfile.TemporaryDirectory() as folder:
            main(str(make_tiny_model(Path(folder) / "tiny")))
