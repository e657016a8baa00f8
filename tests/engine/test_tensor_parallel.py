"""One engine over two GPUs: its ranks do the same work, which is counted once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine.tensor_parallel import REQUESTS
from tests.processes import results_of


@pytest.fixture(scope="module")
def run(engine_environment: dict[str, str], model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    torch = pytest.importorskip("torch")
    if torch.cuda.device_count() < 2:
        pytest.skip("tensor parallelism takes two GPUs, and there are fewer here")
    folder = tmp_path_factory.mktemp("ranks")
    environment = {
        **engine_environment,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    }
    script = Path(__file__).with_name("tensor_parallel.py")
    return results_of(script, model, folder=folder, environment=environment, timeout=300)


def test_it_is_one_engine_with_one_core(run: dict[str, Any]):
    assert run["engines"] == [0]
    assert run["index"] == [0]
    assert (run["cores"], run["why none"], run["lost"], run["faults"]) == (1, "", 0, {})


def test_tokens_are_counted_once(run: dict[str, Any]):
    assert run["sums"]["num_prompt_tokens"] == sum(run["prompts"])
    assert run["sums"]["num_generation_tokens"] == sum(run["generated"])
    assert run["sums"]["prefix_cache_hits"] == sum(run["cached"])
    assert run["requests"] == REQUESTS
    assert run["lives"] == sorted(run["generated"])
    assert run["scheduled"] == sum(run["prompts"]) - sum(run["cached"]) + sum(run["generated"]) - REQUESTS
