"""What the vLLM of this environment is, and what it cannot say: the engine tests run on many releases.

Read from the contracts (`tests/contracts`), that is from vLLM's code, never from kvhook. A test asks
``recorded.lacks("column")`` where some releases have no such number: there it is proved absent, with a reason.
"""

from __future__ import annotations

import gc
import os
import re
import weakref
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.contracts.loader import load
from tests.contracts.release_facts import ReleaseFacts
from tests.workloads import BLOCK_SIZE, BLOCKS, SMALL

#: Chosen by vLLM's own variable, which only releases with both engines know.
V0 = os.environ.get("VLLM_USE_V1") == "0"

STATS = "vllm.v1.metrics.stats"
#: Column -> the field of vLLM's without which there is no such number. A column not named here exists everywhere.
NEEDS = {
    "step": {
        "num_skipped_waiting_reqs": ("SchedulerStats", "num_skipped_waiting_reqs"),
        "prefix_cache_preempted_requests": ("PrefixCacheStats", "preempted_requests"),
        "prefix_cache_preempted_queries": ("PrefixCacheStats", "preempted_queries"),
        "prefix_cache_preempted_hits": ("PrefixCacheStats", "preempted_hits"),
        "connector_prefix_cache_queries": ("SchedulerStats", "connector_prefix_cache_stats"),
        "connector_prefix_cache_hits": ("SchedulerStats", "connector_prefix_cache_stats"),
        "num_prompt_tokens_computed": ("PromptTokenStats", "computed"),
        "num_prompt_tokens_cached": ("PromptTokenStats", "cached_tokens"),
        "num_prompt_tokens_external": ("PromptTokenStats", "external_kv_transfer"),
        "num_corrupted_reqs": ("IterationStats", "num_corrupted_reqs"),
        "num_drafts": ("SchedulerStats", "spec_decoding_stats"),
        "num_draft_tokens": ("SchedulerStats", "spec_decoding_stats"),
        "num_accepted_tokens": ("SchedulerStats", "spec_decoding_stats"),
        "mm_cache_queries": ("MultiModalCacheStats", "queries"),
        "mm_cache_hits": ("MultiModalCacheStats", "hits"),
    },
    "request": {
        "num_cached_tokens": ("FinishedRequestStats", "num_cached_tokens"),
        "num_preemptions": ("FinishedRequestStats", "num_preemptions"),
        "time_to_first_token": ("RequestStateStats", "first_token_latency"),
        "mean_time_per_output_token": ("FinishedRequestStats", "mean_time_per_output_token"),
    },
}
#: Columns that V1 engines of no release have, or not without being asked for.
NEVER = {
    "step": {"num_swapped_reqs", "cpu_kv_cache_usage", "v0_prefix_cache_hit_rate", "num_evicted_blocks_sampled"},
    "request": set(),
}
#: V0 has none of the numbers that only some V1 engines have, nor V1's of the prefix cache; and on a CPU its KV cache
#: itself is in the CPU's memory, so that there is nothing to swap out to.
V0_ABSENT = {
    "step": set(NEEDS["step"])
    | {f"prefix_cache_{what}" for what in ("requests", "queries", "hits", "reset")}
    | {"num_evicted_blocks_sampled", "cpu_kv_cache_usage", "vllm_stats_ns"},
    "request": set(NEEDS["request"]) - {"time_to_first_token"} | {"request_id", "sample_index"},
}


@cache
def facts() -> ReleaseFacts:
    """The contract of the installed release. vLLM is not imported for that: some tests do it themselves, later."""
    found = find_spec("vllm")
    assert found is not None
    assert found.origin is not None
    text = Path(found.origin).with_name("_version.py").read_text(encoding="utf-8")
    (version,) = re.findall(r"^__version__ = version = '([\d.a-z]+)", text, re.MULTILINE)
    return load(version)


def since(*release: int) -> bool:
    """Whether this vLLM is at least of that release."""
    return tuple(int(part) for part in re.findall(r"\d+", facts().release)[: len(release)]) >= release


def no_binding() -> str:
    """The value of VLLM_CPU_OMP_THREADS_BIND with which a thread may run on any core."""
    if since(0, 20) and not since(0, 21):
        # 0.20 fails when it wants to log that nothing is bound
        return ",".join(map(str, sorted(os.sched_getaffinity(0))))
    return "nobind" if since(0, 11) else "all"


def has_field(cls: str, field: str, module: str = STATS) -> bool:
    return field in facts().readable(module, cls)


#: What is read from the scheduler, if that is in the same process.
PEAKS = {"num_kv_blocks_peak", "kv_cache_usage_peak"}


def absent(kind: str, stats_on: bool = False) -> set[str]:
    """The columns that a record of this kind cannot have here. With the user's `stats_on`, vLLM makes none for kvhook,
    whose cost it could say."""
    found = NEVER[kind] | {column for column, (cls, field) in NEEDS[kind].items() if not has_field(cls, field)}
    return found | ({"vllm_stats_ns"} if stats_on and kind == "step" else set())


def usage(blocks_in_use: Any, usable: int) -> Any:
    """V1's own figure for its KV cache: before 0.10.2 the null block counts, as one that is always in use."""
    return blocks_in_use / usable if since(0, 10, 2) else (blocks_in_use + 1) / (usable + 1)


def engine_has(attribute: str) -> bool:
    """Whether the V1 engine keeps its loggers there: in a logger_manager from 0.11, before it in a stat_logger."""
    engine = facts().find("vllm.v1.engine.llm_engine", "LLMEngine")
    return engine is not None and engine.calls.stat_logger_attribute == attribute


def outputs_have_metrics() -> bool:
    """Whether V1 hangs the request's time stamps on its output: seen in real runs, no contract tells it."""
    return since(0, 11)


def options() -> dict[str, Any]:
    """The options of the small engine that this vLLM takes."""
    if not V0:
        return SMALL
    # V0's CPU kernels know blocks of 16 tokens only, and neither prefix caching nor chunked prefill
    small = {name: value for name, value in SMALL.items() if name != "use_tqdm_on_load"}
    blocks = {"block_size": 16, "num_gpu_blocks_override": BLOCKS * BLOCK_SIZE // 16}
    return small | blocks | {"enable_prefix_caching": False, "enable_chunked_prefill": False}


def collect_engines() -> None:
    """Delete the engines that nobody holds any more. Each is full of circles, which vLLM froze (`gc.freeze`) when
    it made the engine after them: they would be deleted in the middle of a later engine's work.

    What is left is frozen again: vLLM collects nine times while it makes an engine, six seconds of eight otherwise."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def end_workers_with(engine: Any) -> None:
    """End an engine's worker processes when the engine is deleted. vLLM does not where its core is in this process:
    from 0.20 to 0.22 a CPU engine has a worker process, which stays and takes a core for itself."""
    core = getattr(getattr(engine, "engine_core", None), "engine_core", None)
    executor = getattr(core, "model_executor", None)
    if getattr(executor, "workers", None):
        assert executor is not None
        weakref.finalize(engine, executor.shutdown)


def stand_numba() -> None:
    """vLLM 0.32 asks every object of every module for its ``vars()``. The n-gram drafter imports numba, which has one
    that answers with something else than a dictionary: no engine could be made after one with that drafter."""
    try:
        from vllm.triton_utils import dispatcher  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return

    def only_dictionaries(value: Any) -> dict[str, Any]:
        found = vars(value)
        return found if isinstance(found, dict) else {}

    dispatcher.vars = only_dictionaries
