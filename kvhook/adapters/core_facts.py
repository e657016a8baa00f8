"""Facts about a vLLM engine core: settings, KV cache groups, the memory of a block, and how it schedules."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from kvhook.adapters.table import read_path

#: Fact about a core -> path below the scheduler's VllmConfig, or several, of which the first that is there is taken.
FACTS: Mapping[str, str | tuple[str, ...]] = {
    "model": "model_config.model",
    "block_size": "cache_config.block_size",
    "enable_prefix_caching": "cache_config.enable_prefix_caching",
    "kv_cache_dtype": "cache_config.cache_dtype",
    "max_num_seqs": "scheduler_config.max_num_seqs",
    "max_num_batched_tokens": "scheduler_config.max_num_batched_tokens",
    "long_prefill_token_threshold": "scheduler_config.long_prefill_token_threshold",
    "enable_chunked_prefill": "scheduler_config.enable_chunked_prefill",
    "policy": "scheduler_config.policy",
    "async_scheduling": "scheduler_config.async_scheduling",
    # from 0.14 a rank that works by itself (all but mixtures of experts) is told that it is rank 0 of 1
    "data_parallel_rank": ("parallel_config.data_parallel_index", "parallel_config.data_parallel_rank"),
    "data_parallel_size": "parallel_config.data_parallel_size",
    "pipeline_parallel_size": "parallel_config.pipeline_parallel_size",
    # from 0.11; before, the requests tell it
    "num_front_ends": "parallel_config._api_process_count",
    # the share of the blocks that an admission leaves free while others run
    "watermark": "scheduler_config.watermark",
}

#: Kinds of KV cache that keep all tokens of a request, in the order in which they came. Layers with a sliding window
#: are of them where vLLM keeps their old tokens all the same.
_PLAIN = ("FullAttentionSpec", "MLAAttentionSpec")

_GROUPS = "this model has several KV cache groups, which hold different tokens"
_WINDOW = "this model's cache drops tokens of its own accord (sliding window, Mamba or the like)"
_CONNECTOR = "a KV connector may hold blocks of requests that are not running"


def facts_of(sched: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a core: of its settings, its cache and how it schedules.

    Args:
        sched: vLLM's scheduler.
        found: its block manager, pool and queue of free blocks.
    """
    config = getattr(sched, "vllm_config", None)
    facts = {name: _plain(_first(config, paths)) for name, paths in FACTS.items()}
    pool = found["pool"]
    facts["num_gpu_blocks"] = int(pool.num_gpu_blocks)
    facts["num_kv_blocks"] = int(pool.num_gpu_blocks) - (getattr(pool, "null_block", None) is not None)
    facts["enable_prefix_caching"] = bool(getattr(pool, "enable_caching", facts["enable_prefix_caching"]))
    # with context parallelism a block holds more tokens than the setting says
    facts["block_size"] = int(getattr(sched, "block_size", 0) or facts["block_size"])
    facts["scheduler_class"] = f"{type(sched).__module__}.{type(sched).__qualname__}"
    facts["kv_groups"] = _groups(getattr(sched, "kv_cache_config", None))
    facts["plain_attention"] = all(group["kind"] in _PLAIN for group in facts["kv_groups"])
    facts["bytes_per_block"] = _bytes_per_block(getattr(sched, "kv_cache_config", None))
    facts["connector"] = type(sched.connector).__name__ if getattr(sched, "connector", None) is not None else ""
    facts["lora"] = bool(getattr(sched, "lora_config", None))
    facts |= _rules(sched, found)
    return facts


def _empty_blocks_first(sched: Any, found: Mapping[str, Any]) -> bool:
    """Whether blocks without content are handed out before all others: from 0.24 on. In 0.23 only those of sliding
    windows are, for which the pool is asked by an argument."""
    if not hasattr(found["queue"], "prepend_n"):
        return False
    if "prepend" not in inspect.signature(found["pool"].free_blocks).parameters:
        return True
    groups = _groups(getattr(sched, "kv_cache_config", None))
    return bool(groups) and all(group["sliding_window"] for group in groups)


def _rules(sched: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """How this scheduler admits requests and which free blocks it hands out first, for `kvhook.whatif.replay`."""
    return {
        "token_budget": int(sched.max_num_scheduled_tokens),
        "max_model_len": _plain(getattr(sched, "max_model_len", None)),
        # from 0.19: a request is admitted only if its whole prompt finds room
        "whole_prompt_must_fit": bool(getattr(sched, "scheduler_reserve_full_isl", False)),
        # 0.19 and 0.20: whether it does is asked before blocks are asked for
        "room_is_asked_first": bool(getattr(sched, "scheduler_reserve_full_isl", False))
        and hasattr(found["manager"], "can_fit_full_sequence"),
        "empty_blocks_first": _empty_blocks_first(sched, found),
        # 0 for models that are given text only
        "encoder_budget": int(getattr(sched, "max_num_encoder_input_tokens", 0) or 0),
        "num_lookahead_tokens": int(getattr(sched, "num_lookahead_tokens", 0) or 0),
        "num_spec_tokens": int(getattr(sched, "num_spec_tokens", 0) or 0),
    }


def _first(config: Any, paths: str | tuple[str, ...]) -> Any:
    found = (read_path(config, path) for path in ((paths,) if isinstance(paths, str) else paths))
    return next((value for value in found if value is not None), None)


def _groups(config: Any) -> list[dict[str, Any]]:
    """The KV cache groups: kind of cache, tokens of a block, bytes of a block of one layer, how many layers."""
    groups = []
    for group in getattr(config, "kv_cache_groups", None) or ():
        spec = getattr(group, "kv_cache_spec", None)
        groups.append(
            {
                "kind": _kind(spec),
                "block_size": _plain(getattr(spec, "block_size", None)),
                "page_bytes": _plain(getattr(spec, "page_size_bytes", None)),
                "sliding_window": _plain(getattr(spec, "sliding_window", None)),
                "layers": len(getattr(group, "layer_names", ()) or ()),
            }
        )
    return groups


def _kind(spec: Any) -> str:
    """The class of a group's specification; of one that holds layers of one kind but different sizes, theirs."""
    inner = {type(one).__name__ for one in (getattr(spec, "kv_cache_specs", None) or {}).values()}
    return inner.pop() if len(inner) == 1 else type(spec).__name__


def _bytes_per_block(config: Any) -> int | None:
    """What one KV block takes in all layers and groups, on one device.

    Up to 0.28 each tensor has memory of its own, unless several are packed into one allocation; from 0.29 on all lie in
    one allocation, and the size of each is that of the whole.
    """
    tensors = getattr(config, "kv_cache_tensors", None)
    tensors = list(tensors) if tensors is not None else list(getattr(config, "tensors", {}).values())
    blocks = getattr(config, "num_blocks", 0)
    alone: list[int] = []
    together = [0]
    for tensor in tensors:
        size = getattr(tensor, "size", None)
        if not isinstance(size, int):
            return None
        if getattr(tensor, "host_resident", False):
            continue
        packed = hasattr(tensor, "layers") or bool(getattr(tensor, "block_stride", 0))
        (together if packed else alone).append(size)
    return (sum(alone) + max(together)) // blocks if blocks and tensors else None


def absent_in(facts: Mapping[str, Any]) -> dict[str, str]:
    """Columns that this engine cannot fill."""
    groups = facts["kv_groups"]
    if len(groups) > 1:
        return {"num_kv_tokens": _GROUPS}
    if not facts["plain_attention"]:
        return {"num_kv_tokens": _WINDOW}
    return {"num_kv_tokens": _CONNECTOR} if facts["connector"] else {}


def _plain(value: Any) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    return str(getattr(value, "value", value))
