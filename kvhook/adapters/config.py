"""What vLLM's configuration tells about an engine, and the arithmetic of its KV blocks."""

from __future__ import annotations

import sys
import types
from collections.abc import Mapping
from typing import Any

from kvhook.adapters.table import Adapter, read_path, release, vllm_version
from kvhook.facts import plain_fact

#: Fact about an engine -> path below vLLM's VllmConfig, the same in every release.
FACTS: Mapping[str, str] = {
    "model": "model_config.model",
    "dtype": "model_config.dtype",
    "runner_type": "model_config.runner_type",
    "max_model_len": "model_config.max_model_len",
    "block_size": "cache_config.block_size",
    "num_gpu_blocks": "cache_config.num_gpu_blocks",
    "kv_cache_size_tokens": "cache_config.kv_cache_size_tokens",
    "kv_cache_dtype": "cache_config.cache_dtype",
    "enable_prefix_caching": "cache_config.enable_prefix_caching",
    "kv_cache_metrics": "observability_config.kv_cache_metrics",
    "max_num_seqs": "scheduler_config.max_num_seqs",
    "max_num_batched_tokens": "scheduler_config.max_num_batched_tokens",
    "enable_chunked_prefill": "scheduler_config.enable_chunked_prefill",
    "async_scheduling": "scheduler_config.async_scheduling",
    "max_loras": "lora_config.max_loras",
    "tensor_parallel_size": "parallel_config.tensor_parallel_size",
    "pipeline_parallel_size": "parallel_config.pipeline_parallel_size",
    "data_parallel_size": "parallel_config.data_parallel_size",
    "data_parallel_rank": "parallel_config.data_parallel_rank",
    "executor": "parallel_config.distributed_executor_backend",
    "device": "device_config.device_type",
}

#: Path below an engine whose scheduler is in this process: its kinds of layers, one group for each.
CACHE_GROUPS = "engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups"

_NULL_BLOCK_COUNTS = (
    "vLLM's own figure: before 0.10.2 the block that vLLM keeps for itself counts as used, so that an idle cache of N "
    "blocks shows 1/N. num_kv_blocks_used does not count it"
)


def engine_facts(adapter: Adapter, engine: Any) -> dict[str, Any]:
    """What is known of an engine: model, block size, number of KV blocks...

    Args:
        engine: its VllmConfig is read, where that is (before 0.6.6 the engine itself holds the parts). A part that
            this vLLM does not have is None in the answer.

    Raises:
        LookupError: what the adapter asks (`Adapter.asks`) is not where it says.
    """
    config = getattr(engine, "vllm_config", None) or engine
    facts = {name: plain_fact(read_path(config, path)) for name, path in adapter.facts.items()}
    facts["on_gpu"] = facts.get("device") != "cpu"
    facts["timed_steps"] = adapter.timed
    facts["notes"] = dict(adapter.notes)
    facts |= {name: ask() for name, ask in adapter.asks.items()}
    facts |= _kv_blocks(adapter, facts, engine, config)
    facts |= _groups(facts, engine)
    return facts


def _groups(facts: Mapping[str, Any], engine: Any) -> dict[str, Any]:
    """How many groups of layers share the KV blocks, and the tokens that fit where vLLM does not say it itself.

    Up to 0.25 vLLM reckons so for its log: the blocks, shared evenly, each as long as the shortest kind of block.
    """
    groups = read_path(engine, CACHE_GROUPS)
    if not isinstance(groups, (list, tuple)) or not groups:
        return {"num_kv_cache_groups": None}
    sizes = [read_path(group, "kv_cache_spec.block_size") for group in groups]
    blocks, tokens = facts.get("num_gpu_blocks"), facts.get("kv_cache_size_tokens")
    if tokens is None and isinstance(blocks, int) and all(isinstance(size, int) for size in sizes):
        tokens = blocks // len(groups) * min(sizes)
    return {"num_kv_cache_groups": len(groups), "kv_cache_size_tokens": tokens}


def _kv_blocks(adapter: Adapter, facts: dict[str, Any], engine: Any, config: Any) -> dict[str, Any]:
    """How many KV blocks can be used, and how vLLM's usage is turned into a number of them.

    ``num_kv_blocks_used = kv_cache_usage * kv_usage_of - kv_usage_reserved``
    """
    blocks = facts.get("num_gpu_blocks") or read_path(config, "cache_config.num_gpu_blocks_override")
    ranks = facts.get("data_parallel_size") or 1
    if ranks > 1 and isinstance(blocks, int):
        # vLLM adds up the blocks of all the engine cores it talks to
        client = getattr(engine, "engine_core", None)
        cores = len(getattr(client, "core_engines", None) or (client,))
        blocks = blocks // cores if client is not None and not blocks % cores else None
    kept, left_out = null_block() if adapter.may_have_null_block else (False, False)
    if not isinstance(blocks, int) or blocks <= kept:
        return {"num_kv_blocks": None}
    if kept and not left_out:
        facts["notes"].setdefault("kv_cache_usage", _NULL_BLOCK_COUNTS)
    return {
        "num_kv_blocks": blocks - kept,
        "kv_usage_of": blocks - left_out,
        "kv_usage_reserved": int(kept and not left_out),
    }


def null_block() -> tuple[bool, bool]:
    """Whether V1 keeps one KV block for itself (the null block), and whether its usage leaves that block out.

    0.8.0 to 0.8.2 have none; from 0.8.3 it counts as used; since 0.10.2 usage is over the others. The code itself is
    asked: what it says of three blocks of which two are free, and whether it has a null block. Where that cannot be
    asked (the scheduler lives in another process), the version decides.
    """
    pool: Any = getattr(sys.modules.get("vllm.v1.core.block_pool"), "BlockPool", None)
    try:
        left_out = pool.get_usage(types.SimpleNamespace(num_gpu_blocks=3, get_num_free_blocks=lambda: 2)) == 0
        return left_out or "null_block" in pool.__init__.__code__.co_names, left_out
    except Exception:
        version = release(vllm_version()) or (1,)
        return version >= (0, 8, 3), version >= (0, 10, 2)
