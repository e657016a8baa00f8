"""vLLM's V0 engine, to 0.10.x: one `Stats` object for everything, made by `_get_stats` and given to every logger.

It is taken as it passes and never asked for again: up to 0.6.x making it resets the requests' clocks. A step of V0 may
make none (the inner steps of multi-step scheduling, the first with the asynchronous output processor) or two (when
that one is drained): what belongs to one call of ``step`` becomes one record.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

from kvhook.adapters.config import FACTS
from kvhook.adapters.table import Adapter, Read, Source, Target
from kvhook.schema import FINISH_REASONS

ENGINE = "vllm.engine.llm_engine"
TYPES = "vllm.engine.metrics_types"

_BLOCKS = "V0 counts its prefix cache in blocks and gives a running rate of them only: v0_prefix_cache_hit_rate"
_NO_SPLIT = "V0 does not split prompt tokens by where they came from"
_NO_DRAFTS = "V0 gives totals of the worker's speculative decoding now and then, not of steps"
_NO_CLOCKS = "this vLLM gives the end-to-end latency of a request only"
_NOT_TOLD_APART = "V0's stats are lists of numbers that do not say which request each one is from"
_NOT_PER_REQUEST = "V0 does not count it per request"


def merge(earlier: Any, later: Any) -> Any:
    """Two Stats of one step as one: what was counted adds up, states are those at the end."""
    both = copy.copy(later)
    for name, value in vars(earlier).items():
        if name.endswith(("_iter", "_requests")):
            setattr(both, name, value + getattr(later, name))
    return both


def rate(value: float) -> float:
    """A rate; V0 says -1 where there is none."""
    return value if value >= 0 else float("nan")


def reason(value: Any) -> int:
    """The code of a finish reason that is given as text."""
    return FINISH_REASONS.index(value) if value in FINISH_REASONS else -1


def each(values: Sequence[Any], outputs: Sequence[int], join: Callable[[list[Any]], Any]) -> Sequence[Any]:
    """Values of single outputs as one per request, where requests have several outputs (n > 1)."""
    if len(values) == len(outputs) or len(values) != sum(outputs):
        return values
    rest = iter(values)
    return [join(list(itertools.islice(rest, n))) for n in outputs]


def plus(left: Sequence[float], right: Sequence[float]) -> list[float]:
    """Sums of two lists, number by number."""
    return [a + b for a, b in zip(left, right, strict=False)]


V0 = Adapter(
    name="v0",
    family="v0",
    has_levels=False,  # all its stats are made in one piece
    may_have_null_block=False,
    shares_engine_name=True,
    engine=f"{ENGINE}:LLMEngine",
    targets=(
        Target("engine_init", f"{ENGINE}:LLMEngine.__init__", takes=("log_stats", "stat_loggers")),
        Target("engine_step", f"{ENGINE}:LLMEngine.step"),
        Target("stats", f"{ENGINE}:LLMEngine._get_stats", takes=("scheduler_outputs",)),
    ),
    tap="engine",
    holder="",
    record=f"{TYPES}:StatLoggerBase.log",
    sources=(Source("v0", f"{TYPES}:Stats", argument="stats", flags=("has_scheduler_stats", "has_iteration_stats")),),
    steps=(
        Read("num_running_reqs", ("v0.num_running_sys",)),
        Read("num_waiting_reqs", ("v0.num_waiting_sys",)),
        Read("num_swapped_reqs", ("v0.num_swapped_sys",)),
        # V0's CPU worker passes the blocks of its only cache off as the GPU's; from 0.9.0 the stats have them back
        # where they belong. The other cache is empty then, so the larger figure is the one.
        Read(
            "kv_cache_usage",
            ("v0.gpu_cache_usage_sys if on_gpu else max(v0.gpu_cache_usage_sys, v0.cpu_cache_usage_sys)",),
        ),
        Read(
            "cpu_kv_cache_usage",
            ("v0.cpu_cache_usage_sys",),
            needs="on_gpu",
            unmet="on a CPU the KV cache itself is in the CPU's memory: there is nothing to swap out to",
        ),
        Read(
            "v0_prefix_cache_hit_rate",
            (
                "rate(v0.gpu_prefix_cache_hit_rate if on_gpu"
                " else max(v0.gpu_prefix_cache_hit_rate, v0.cpu_prefix_cache_hit_rate))",
            ),
        ),
        Read("prefix_cache_requests", (), _BLOCKS),
        Read("prefix_cache_queries", (), _BLOCKS),
        Read("prefix_cache_hits", (), _BLOCKS),
        Read("num_prompt_tokens", ("v0.num_prompt_tokens_iter",)),
        Read("num_prompt_tokens_computed", (), _NO_SPLIT),
        Read("num_prompt_tokens_cached", (), _NO_SPLIT),
        Read("num_prompt_tokens_external", (), _NO_SPLIT),
        # up to 0.6.5 it is a float
        Read("num_generation_tokens", ("int(v0.num_generation_tokens_iter)",)),
        Read("num_preempted_reqs", ("v0.num_preemption_iter",)),
        Read("num_drafts", (), _NO_DRAFTS),
        Read("num_draft_tokens", (), _NO_DRAFTS),
        Read("num_accepted_tokens", (), _NO_DRAFTS),
    ),
    values=(
        Read("time_to_first_token", ("v0.time_to_first_tokens_iter",)),
        Read("inter_token_latency", ("v0.inter_token_latencies_iter", "v0.time_per_output_tokens_iter")),
    ),
    finished=Read("", ("v0.time_e2e_requests",)),
    requests=(
        Read("request_id", (), "this vLLM does not say which request finished"),
        Read("sample_index", (), "V0 counts the samples of a prompt as one request"),
        *(Read(column, (), _NOT_TOLD_APART) for column in ("prompt_number", "label", "lora_name")),
        Read("finish_reason", ("list(map(reason, each(v0.finished_reason_requests, v0.n_requests, first)))",)),
        Read("num_prompt_tokens", ("v0.num_prompt_tokens_requests",)),
        Read("num_generation_tokens", ("each(v0.num_generation_tokens_requests, v0.n_requests, sum)",)),
        Read("num_cached_tokens", (), _NOT_PER_REQUEST),
        Read("num_preemptions", (), _NOT_PER_REQUEST),
        Read("max_tokens", ("list(map(number, v0.max_tokens_requests))",), "this vLLM does not give it"),
        Read("queued_time", ("v0.time_queue_requests",), _NO_CLOCKS),
        Read("prefill_time", ("v0.time_prefill_requests",), _NO_CLOCKS),
        Read("decode_time", ("v0.time_decode_requests",), _NO_CLOCKS),
        Read("inference_time", ("v0.time_inference_requests",), _NO_CLOCKS),
        Read("e2e_latency", ("v0.time_e2e_requests",)),
        # from arrival to first scheduled, and from there to the first token
        Read("time_to_first_token", ("plus(v0.time_queue_requests, v0.time_prefill_requests)",), _NO_CLOCKS),
        Read(
            "mean_time_per_output_token",
            (),
            "this vLLM does not compute it; it is decode_time / (num_generation_tokens - 1)",
        ),
    ),
    facts={**FACTS, "enable_chunked_prefill": "scheduler_config.chunked_prefill_enabled"},
    helpers={
        "merge": merge,
        "rate": rate,
        "reason": reason,
        "each": each,
        "plus": plus,
        "first": itemgetter(0),
    },
    quiet={"stat_loggers": dict},
    schedulers="scheduler",
    free_blocks=("block_manager.get_num_free_gpu_blocks",),
    until="0.11.0",
    notes={
        "num_prompt_tokens": "prompt tokens that were scheduled in this step: those of a chunk, and those of a "
        "preempted request once more",
    },
)
