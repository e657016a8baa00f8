"""What a KV block takes, in models with one kind of layer and with several: vLLM's own plan of the memory says it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.core.conftest import Recording

Make = Callable[..., Recording]

TOKENS, HEADS, HEAD_SIZE, BYTES_OF_A_NUMBER = 16, 2, 64, 2
#: Keys and values of one layer.
PAGE = 2 * TOKENS * HEADS * HEAD_SIZE * BYTES_OF_A_NUMBER
MEMORY = 1000 * PAGE + 17

#: What the layers are -> how many pages a block has: layers of one kind are in it together, kinds take turns.
MODELS: dict[str, tuple[str, int]] = {
    "full attention": ("ffff", 4),
    "full attention and sliding windows": ("fsfsfs", 3),
    "one layer of full attention to two with a sliding window": ("fssfss", 2),
}


def plan(layers: str, layout: str) -> Callable[[Any], Any]:
    """Gives what vLLM makes of `MEMORY` for a model with such layers."""

    def make(config: Any) -> Any:
        import torch
        from vllm.v1 import kv_cache_interface as interface
        from vllm.v1.core import kv_cache_utils

        if not hasattr(kv_cache_utils, "get_kv_cache_configs"):
            pytest.skip("up to 0.10 vLLM plans the memory of each worker by itself")
        more = {"block_size": TOKENS, "num_kv_heads": HEADS, "head_size": HEAD_SIZE, "dtype": torch.bfloat16}
        kinds = {
            "f": lambda: interface.FullAttentionSpec(**more),
            "s": lambda: interface.SlidingWindowSpec(sliding_window=64, **more),
        }
        config.cache_config.num_gpu_blocks_override = None
        if hasattr(config.cache_config, "kv_cache_layout"):  # from 0.29
            config.cache_config.kv_cache_layout = layout
        specs = {f"model.layers.{number}.attn": kinds[kind]() for number, kind in enumerate(layers)}
        (found,) = kv_cache_utils.get_kv_cache_configs(config, [specs], [MEMORY])
        return found

    return make


@pytest.mark.parametrize("layout", ["LBHNC", "BLHNC"])
@pytest.mark.parametrize("model", MODELS)
def test_a_block_takes_what_its_layers_take_and_all_blocks_fill_the_memory(driver: Make, model: str, layout: str):
    layers, pages = MODELS[model]
    recording = driver(blocks=1, cache=plan(layers, layout), max_model_len=128)
    facts = recording.core.facts
    assert facts["bytes_per_block"] == pages * PAGE
    assert facts["num_gpu_blocks"] == MEMORY // (pages * PAGE)
    assert 0 <= MEMORY - facts["num_gpu_blocks"] * facts["bytes_per_block"] < pages * PAGE
    kinds = {"f": "FullAttentionSpec", "s": "SlidingWindowSpec"}
    assert {group["kind"] for group in facts["kv_groups"]} == {kinds[kind] for kind in layers}
