"""What the vLLM of this environment has of what the cases ask for, and what it counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from tests.engine.settings import cases
from tests.engine.settings.cases import Can

#: kind -> how many cases were left out, and why: told at the end of the run
left_out: Counter[str] = Counter()


@cache
def can() -> Can:
    if find_spec("vllm") is None:
        return Can()
    lacks = {}
    if says("v1/worker/cpu_model_runner.py", "assert self.speculative_config is None"):
        lacks["drafts"] = "this vLLM has no speculative decoding on a CPU"
    if not (says("config/scheduler.py", "async_scheduling") or says("config/__init__.py", "async_scheduling")):
        lacks["overlapped"] = "this vLLM has no asynchronous scheduling"
    if not says("v1/request.py", "def __lt__"):
        lacks["priority"] = "this vLLM fails when two requests of one priority arrive at the same time"
    return Can(
        lacks=lacks,
        block_sizes=(32, 64, 96, 128) if says("v1/attention/backends/cpu_attn.py", "MultipleOf(32)") else (16, 32, 128),
        reset_running=says("v1/engine/llm_engine.py", "reset_running_requests"),
    )


def run(seeds: Iterable[int]) -> list[int]:
    """Those of the seeds whose cases this release can run; the others are counted."""
    found = []
    for seed in seeds:
        settings = cases.settings(seed // cases.PER_ENGINE, can())
        if settings.kind in can().lacks:
            left_out[f"{settings.kind}: {can().lacks[settings.kind]}"] += 1
        elif settings.stats_on and asserts_stats():
            left_out["the user's stats on: LLMEngine.step of this vLLM fails in a step without stats"] += 1
        else:
            found.append(seed)
    return found


def says(file: str, text: str) -> bool:
    """Whether this vLLM's code holds that text; it is not imported for that."""
    found = find_spec("vllm")
    assert found is not None
    assert found.origin is not None
    path = Path(found.origin).parent / file
    return path.exists() and text in path.read_text(encoding="utf-8")


def asserts_stats() -> bool:
    """Whether ``LLMEngine.step`` raises where stats are on and the engine core made none, with kvhook or without."""
    return says("v1/engine/llm_engine.py", "assert outputs.scheduler_stats is not None")


def last_look_up_told() -> bool:
    """Whether a request that was preempted before its first token is told what its last look-up found. The first one's
    is written over up to 0.25."""
    scheduler = "v1/core/sched/scheduler.py"
    return says(scheduler, "request.prefill_stats.set(") and not says(scheduler, "request.num_preemptions <= 0")


def unhashed_first() -> bool:
    """Whether freed blocks without a hash are taken before all others, rather than in the order of freeing. 0.23 does
    so with those of sliding windows alone, and asks for it by an argument."""
    pool = "v1/core/block_pool.py"
    return says(pool, "prepend_n(") and not says(pool, "prepend: bool")


def admission_only() -> bool:
    """Whether a look-up counts only if its request then got its place."""
    return says("v1/core/kv_cache_manager.py", "def record_prefix_cache_stats")
