"""Why a batch did not grow: each reason is provoked on vLLM's scheduler, alone, and told in the steps it holds for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest

from tests.core.conftest import Recording

Make = Callable[..., Recording]

ROOMY: dict[str, Any] = {"blocks": 200, "max_num_seqs": 8, "max_num_batched_tokens": 128, "max_model_len": 512}
LONG, SHORT = list(range(2, 102)), list(range(200, 220))


def told(recording: Recording) -> list[str]:
    limits: list[str] = recording.read().steps()["limited_by"].tolist()
    return limits


def has(path: str) -> Any:
    """What a path says in this vLLM; the test is skipped if it is not there."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return pytest.skip(f"this vLLM has no {path}")


def test_nobody_waits(driver: Make):
    recording = driver(**ROOMY)
    recording.driver.add(SHORT, max_tokens=3)
    list(recording.driver.run())
    assert told(recording) == ["none_waiting"] * 3


def test_as_many_run_as_may(driver: Make):
    recording = driver(**ROOMY | {"max_num_seqs": 1})
    for _ in range(2):
        recording.driver.add(SHORT, max_tokens=3)
    list(recording.driver.run())
    assert told(recording) == ["max_num_seqs"] * 3 + ["none_waiting"] * 3


def test_the_tokens_of_a_step_are_used_up(driver: Make):
    recording = driver(**ROOMY | {"max_num_batched_tokens": 40})
    recording.driver.add(LONG, max_tokens=2)
    list(recording.driver.run())
    assert told(recording) == ["token_budget", "token_budget", "none_waiting", "none_waiting"]


def test_without_chunks_a_prompt_waits_for_a_step_of_its_own(driver: Make):
    recording = driver(**ROOMY | {"max_num_batched_tokens": 512, "enable_chunked_prefill": False})
    if recording.core.facts["enable_chunked_prefill"]:
        pytest.skip("this vLLM always takes prompts in chunks")
    for first in (2, 102):
        recording.driver.add([first + i % 300 for i in range(300)], max_tokens=2)
    list(recording.driver.run())
    assert told(recording) == ["token_budget", "none_waiting", "none_waiting"]


def test_there_are_no_blocks_for_the_next_one(driver: Make):
    recording = driver(**ROOMY | {"blocks": 9})
    recording.driver.add(LONG, max_tokens=2)
    recording.driver.add(list(range(300, 400)), max_tokens=2)
    list(recording.driver.run())
    assert told(recording) == ["kv_blocks"] * 2 + ["none_waiting"] * 2


def test_a_running_request_gives_up_its_blocks(driver: Make):
    recording = driver(**ROOMY | {"blocks": 5, "enable_prefix_caching": False})
    for _ in range(2):
        recording.driver.add(SHORT, max_tokens=14)
    list(recording.driver.run())
    steps = recording.read().steps()
    assert steps["num_preempted_reqs"].sum() == 1
    assert (steps["limited_by"][steps["num_preempted_reqs"] > 0] == "kv_blocks").all()
    assert steps["limited_by"][0] == "none_waiting"


def test_long_prompts_are_held_back(driver: Make):
    recording = driver(**ROOMY, long_prefill_token_threshold=30)
    for first in (2, 102):
        recording.driver.add(list(range(first, first + 100)), max_tokens=2)
    recording.driver.step()
    assert told(recording) == ["long_prefill"]


def test_a_place_for_a_lora_adapter_is_missing(driver: Make):
    from vllm.lora.request import LoRARequest

    lora_config = has("vllm.config:LoRAConfig")

    def with_lora(config: Any) -> None:
        config.lora_config = lora_config(max_loras=1, max_lora_rank=8)

    recording = driver(**ROOMY, change=with_lora)
    for number in (1, 2):
        adapter = LoRARequest(f"adapter{number}", number, "/adapter")
        recording.driver.add(SHORT, max_tokens=2, lora_request=adapter)
    list(recording.driver.run())
    assert told(recording) == ["lora"] * 2 + ["none_waiting"] * 2
    assert recording.read().lookups()["miss_reason"].tolist() == ["lora", "lora"]


def picture(offset: int) -> dict[str, Any]:
    spec, place = has("vllm.multimodal.inputs:MultiModalFeatureSpec"), has("vllm.multimodal.inputs:PlaceholderRange")
    return {"mm_features": [spec(None, "image", "a picture", place(offset=offset, length=50))]}


@pytest.mark.parametrize(("offset", "steps"), [(0, 1), (30, 2)])
def test_the_encoder_has_no_room_for_a_picture(driver: Make, offset: int, steps: int):
    """A model that takes text only has no budget for an encoder at all. The prompt is computed up to the picture."""
    recording = driver(**ROOMY)
    recording.driver.add(LONG, max_tokens=2, **picture(offset))
    for _ in range(steps):
        recording.driver.step()
    assert told(recording)[-1] == "encoder_budget"
    assert recording.read().steps()["num_scheduled_tokens"].tolist() == [offset, 0][-steps:]


def test_a_grammar_is_still_being_compiled(driver: Make):
    params = has("vllm.sampling_params:StructuredOutputsParams")
    recording = driver(**ROOMY)
    recording.driver.add(SHORT, max_tokens=2, structured_outputs=params(json='{"type": "object"}'))
    recording.driver.add(LONG, max_tokens=2)
    for _ in range(2):
        recording.driver.step()
    assert told(recording) == ["structured_output"] * 2
    assert len(recording.driver.scheduler.running) + recording.driver.scheduler.get_num_unfinished_requests() == 1


def test_the_engine_has_been_paused(driver: Make):
    state = has("vllm.v1.core.sched.interface:PauseState")
    recording = driver(**ROOMY)
    recording.driver.add(SHORT, max_tokens=4)
    recording.driver.step()
    recording.driver.scheduler.set_pause_state(state.PAUSED_NEW)
    recording.driver.add(LONG, max_tokens=2)
    recording.driver.step()
    recording.driver.scheduler.set_pause_state(state.UNPAUSED)
    list(recording.driver.run())
    assert told(recording) == ["none_waiting", "paused", "none_waiting", "none_waiting"]


def test_the_next_part_of_a_prompt_has_not_come_yet(driver: Make):
    import inspect

    from vllm.v1.request import Request

    if "resumable" not in inspect.signature(Request).parameters:
        pytest.skip("in this vLLM a prompt comes as a whole")
    recording = driver(**ROOMY)
    recording.driver.add(SHORT, max_tokens=1, resumable=True)
    recording.driver.add(LONG, max_tokens=3)
    for _ in range(3):
        recording.driver.step()
    limits = told(recording)
    assert limits[0] == "none_waiting"
    assert limits[1:] == ["deferred", "deferred"]
