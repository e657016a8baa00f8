"""What is done to a real engine between its steps is marked where it happened: sleep and wake-up, new weights, an
emptied prefix cache, LoRA adapters."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kvhook
from tests.engine import vllm_here
from tests.engine.conftest import MakeLLM
from tests.workloads import BLOCK_SIZE

pytestmark = pytest.mark.skipif(not vllm_here.since(0, 28), reason="the calls are those of 0.28 and later")

PROMPT = [3 + i % 200 for i in range(3 * BLOCK_SIZE + 5)]


def update_embedding_weights(worker: Any) -> float:
    """What a trainer does to the weights, in every worker; gives how much there was to change."""
    (weights,) = (p for name, p in worker.model_runner.model.named_parameters() if "embed_tokens" in name)
    before = float(weights.abs().sum())
    weights.data.copy_(weights.data.flip(0))
    return before


def make_adapter(folder: Path) -> Path:
    """A LoRA adapter of rank 8 for the tiny model's queries, as PEFT writes one."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    about = {"peft_type": "LORA", "r": 8, "lora_alpha": 64, "target_modules": ["q_proj"], "bias": "none"}
    about |= {"task_type": "CAUSAL_LM", "base_model_name_or_path": "tiny"}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    torch.manual_seed(7)
    place = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    sizes = {"A": (8, 128), "B": (128, 8)}
    tensors = {place.format(layer, which): torch.randn(size) for layer in (0, 1) for which, size in sizes.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


class Work:
    """An engine, and what came of each prompt: its tokens, and how many of them were found in the cache."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    def __call__(self, **more: Any) -> tuple[tuple[int, ...], int]:
        from vllm import SamplingParams  # type: ignore[import-not-found, unused-ignore]

        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=12)
        (one,) = self.llm.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False, **more)
        return tuple(one.outputs[0].token_ids), one.num_cached_tokens


@pytest.fixture
def recording(
    request: pytest.FixtureRequest, make_llm: MakeLLM, tmp_path: Path
) -> Iterator[tuple[kvhook.Session, Work]]:
    kvhook.uninstall()
    with kvhook.install(trace=tmp_path / "run.kvh") as session:
        yield session, Work(make_llm(**getattr(request, "param", {})))


def test_what_is_done_between_generations_is_marked_between_their_steps(recording: Any, tmp_path: Path):
    session, work = recording
    llm, whole = work.llm, 3 * BLOCK_SIZE
    first, cached = work()
    assert cached == 0
    assert work() == (first, whole)
    assert llm.reset_prefix_cache()
    assert work() == (first, 0)  # nothing was found: it was emptied
    llm.sleep(level=1)
    llm.wake_up()
    assert work()[0] == first
    (changed,) = llm.collective_rpc(update_embedding_weights)
    assert changed > 0
    assert llm.reset_prefix_cache()
    assert work()[0] != first  # the weights are others
    llm.collective_rpc("reload_weights")
    assert llm.reset_prefix_cache()
    assert work()[0] == first  # they are those of the file again

    events = session.engine_events
    told = [(event.kind, event.detail, event.outcome) for event in events]
    assert [one for one in told if one[0] not in ("mm_cache_reset", "encoder_cache_reset")] == [
        ("prefix_cache_reset", "", "done"),
        ("sleep", "level 1", "done"),
        ("wake_up", "", "done"),
        ("weights_updated", "update_embedding_weights", "done"),
        ("prefix_cache_reset", "", "done"),
        ("weights_updated", "reload_weights", "done"),
        ("prefix_cache_reset", "", "done"),
    ]
    # each lies between the generations that it lay between
    calls = [scope for scope in session.scopes if scope.kind == "generate"]
    of = [event for event in events if event.kind in ("prefix_cache_reset", "sleep", "wake_up", "weights_updated")]
    for event, before in zip(of, (1, 2, 2, 3, 3, 4, 4), strict=True):
        assert calls[before].ended_ns <= event.began_ns <= event.ended_ns <= calls[before + 1].began_ns
        assert event.engines == (0,)
    # the scheduler's own mark: the step after it was emptied says so
    steps = session.steps()
    assert steps["prefix_cache_reset"].sum() >= 3
    kvhook.uninstall()
    trace = kvhook.open(tmp_path / "run.kvh")
    assert [(e.kind, e.detail, e.outcome) for e in trace.engine_events] == told
    totals = {t.kind: t.calls for t in trace.summary().engine_events}
    assert (totals["sleep"], totals["wake_up"], totals["weights_updated"]) == (1, 1, 2)


@pytest.mark.parametrize("recording", [{"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}], indirect=True)
def test_adapters_are_marked_when_they_are_loaded_used_and_removed(recording: Any, tmp_path: Path):
    from vllm.lora.request import LoRARequest  # type: ignore[import-not-found, unused-ignore]

    session, work = recording
    plain, _ = work()
    adapter = LoRARequest("french", 1, str(make_adapter(tmp_path / "adapter")))
    assert work.llm.llm_engine.add_lora(adapter)
    adapted, cached = work(lora_request=adapter)
    assert adapted != plain
    assert cached == 0  # what the model without it has cached is not its own
    assert work.llm.llm_engine.remove_lora(1)
    told = [(event.kind, event.detail, event.outcome) for event in session.engine_events]
    assert [one for one in told if one[0].startswith("lora")] == [
        ("lora_added", "french", "done"),
        ("lora_first_used", "french", "done"),
        ("lora_removed", "lora_id 1", "done"),
    ]
    assert sorted(session.requests()["lora_name"].tolist()) == ["", "french"]
