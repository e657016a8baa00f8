"""Which settings of their engines differ between runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

#: Facts about an engine, or its core, that are settings: what somebody chose, or what vLLM made of it.
SETTINGS = (
    "vllm",
    "model",
    "dtype",
    "device",
    "runner_type",
    "max_model_len",
    "block_size",
    "num_kv_blocks",
    "num_kv_cache_groups",
    "kv_cache_dtype",
    "enable_prefix_caching",
    "max_num_seqs",
    "max_num_batched_tokens",
    "long_prefill_token_threshold",
    "enable_chunked_prefill",
    "policy",
    "async_scheduling",
    "max_loras",
    "connector",
    "scheduler_class",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel_size",
)


class Setting(NamedTuple):
    """A setting that is not the same in all runs; for each of them its values, which are several if its engines differ,
    and none if it is not known."""

    name: str
    values: tuple[tuple[Any, ...], ...]


def settings_of(facts: Iterable[Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
    """Setting -> its different values in some engines, without those that none of them tells.

    Args:
        facts: of the engines and of their cores.
    """
    found: dict[str, list[Any]] = {}
    for one in facts:
        for name in SETTINGS:
            value = one.get(name)
            if value is not None and value not in found.setdefault(name, []):
                found[name].append(value)
    return {name: tuple(values) for name, values in found.items() if values}


def different(runs: Sequence[Mapping[str, tuple[Any, ...]]]) -> list[Setting]:
    """The settings that are not the same in all runs. One that only some of them tell is no difference.

    Args:
        runs: for each run what `settings_of` gives.
    """
    out = []
    for name in SETTINGS:
        values = tuple(run.get(name, ()) for run in runs)
        if len({frozenset(map(repr, known)) for known in values if known}) > 1:
            out.append(Setting(name, values))
    return out
