"""What is predicted for other sizes of the cache is what real engines of these sizes find. The long form, with ten
sizes, three block sizes and five workloads, is benchmarks/whatif_real.py; tests/core/test_whatif.py has chats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import kvhook
from kvhook.cli import main
from tests.engine import vllm_here
from tests.whatif.real_workloads import WORKLOADS, Asked

SETTINGS = {"max_num_seqs": 6, "max_num_batched_tokens": 256, "max_model_len": 512}
#: The size that is recorded, and those that are predicted: blocks of 32 tokens, the null block not counted.
RECORDED, OTHERS = 80, (50, 100)


@pytest.mark.skipif(not vllm_here.since(0, 10), reason="this vLLM does not tell what single requests have found")
def test_predicted_and_found(make_llm: Any, tmp_path: Path):
    asked: dict[str, Asked] = {}
    told: dict[str, Any] = {}
    kvhook.uninstall()
    for name in ("table rows as they come",):
        trace = tmp_path / f"{name.replace(' ', '-')}.kvh"
        with kvhook.install(trace=trace, core="blocks"):
            asked[name] = Asked(make_llm(num_gpu_blocks_override=RECORDED + 1, **SETTINGS))
            WORKLOADS[name](asked[name].send)
        asked[name].llm = None  # an engine must be gone before the next one is made
        told[name] = kvhook.open(trace).what_if(blocks=[RECORDED, *OTHERS])
        assert told[name].reproduced
        assert told[name].hit_tokens == asked[name].hit_tokens > 0
        assert main(["export", str(trace), str(trace.with_suffix(".jsonl")), "--format", "mooncake"]) == 0
        assert len(trace.with_suffix(".jsonl").read_text().splitlines()) == sum(
            len(ask.prompts) for ask in asked[name].asks
        )
    exact = 0
    for place, blocks in enumerate(OTHERS, 1):
        found = send_again(make_llm, blocks, asked)
        for name, real in found.items():
            size = told[name].sizes[place]
            assert size.query_tokens == real.query_tokens
            if size.exact:
                exact += 1
                assert size.hit_tokens == real.hit_tokens
            assert abs(size.hit_tokens - real.hit_tokens) <= 0.01 * real.query_tokens
    assert exact


def send_again(make_llm: Any, blocks: int, asked: dict[str, Asked]) -> dict[str, Asked]:
    """The same calls on an engine with so many blocks."""
    llm = make_llm(num_gpu_blocks_override=blocks + 1, **SETTINGS)
    found = {}
    for name, recorded in asked.items():
        assert llm.reset_prefix_cache() is not False
        found[name] = Asked(llm)
        found[name].send_again(recorded.asks)
        found[name].llm = None
    return found
