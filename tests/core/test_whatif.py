"""What is predicted for another cache is what vLLM's own scheduler and block pool do with one; and the requests that
are put together from the ledger are those that were sent."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from kvhook.whatif.recorded import NotKnown, recorded_requests
from kvhook.whatif.report import what_if
from kvhook.whatif.runs import run_of, with_block_size
from tests.core.conftest import Recording
from tests.core.scheduler_here import was_preempted

Make = Callable[..., Recording]
SETTINGS: dict[str, Any] = {"max_num_seqs": 6, "max_num_batched_tokens": 96, "max_model_len": 512}
Waves = list[list[tuple[list[int], int]]]


def conversations(seed: int) -> Waves:
    """Prompts and how many tokens to answer, in waves: each turn goes on from what was said, answers included."""
    rng = random.Random(seed)
    system = _tokens(rng, 40)
    said = [system[: rng.randrange(10, 41)] + _tokens(rng, rng.randrange(5, 40)) for _ in range(9)]
    waves: Waves = []
    for _ in range(4):
        waves.append([(prompt, rng.randrange(1, 24)) for prompt in said])
        said = [prompt + answer_of(prompt, most) + _tokens(rng, rng.randrange(3, 30)) for prompt, most in waves[-1]]
        rng.shuffle(said)
    return waves


def _tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(2, 500) for _ in range(count)]


def answer_of(prompt: list[int], most: int) -> list[int]:
    """The "model's" answer to a prompt, whatever runs beside it."""
    return _tokens(random.Random(sum(prompt) * 1000 + len(prompt)), most)


def play(recording: Recording, waves: Waves) -> dict[str, Any]:
    """Send the waves one after the other; gives what vLLM found and did."""
    driver = recording.driver
    prompts: dict[str, tuple[list[int], int]] = {}
    original, made = driver.result_of, driver.scheduler.kv_cache_manager.get_computed_blocks
    found: dict[str, int] = {}

    def result_of(output: Any) -> Any:
        result = original(output)
        for name, sampled in zip(result.req_ids, result.sampled_token_ids, strict=True):
            if sampled:
                sampled[0] = answer_of(*prompts[name])[driver.scheduler.requests[name].num_output_tokens]
        return result

    def get_computed_blocks(request: Any) -> Any:
        result = made(request)
        if not was_preempted(request):
            found[request.request_id] = int(result[1])  # the last one counts: it is admitted with that
        return result

    driver.result_of, driver.scheduler.kv_cache_manager.get_computed_blocks = result_of, get_computed_blocks
    for wave in waves:
        for prompt, most in wave:
            name = driver.add(prompt, max_tokens=most).request_id
            prompts[name] = prompt, most
        list(driver.run())
    driver.result_of, driver.scheduler.kv_cache_manager.get_computed_blocks = original, made
    return {"found": list(found.values()), "prompts": prompts}


@pytest.mark.parametrize("seed", [0])
def test_the_requests_are_put_together_as_they_were_sent(driver: Make, seed: int):
    recording = driver(ledger=True, blocks=40, **SETTINGS)
    sent = play(recording, conversations(seed))
    requests = recorded_requests(recording.read())
    assert requests.num_unknown == 0
    assert requests.found.tolist() == sent["found"]
    assert requests.delay.max() == 0
    assert requests.wave.max() == 3
    content: dict[int, tuple[int, ...]] = {}
    for place, (prompt, most) in enumerate(sent["prompts"].values()):
        known = (prompt + answer_of(prompt, most))[:-1]
        chain = requests.ids[requests.offsets[place] : requests.offsets[place + 1]].tolist()
        assert len(chain) == len(known) // 16
        for index, block in enumerate(chain):
            beginning = tuple(known[: 16 * (index + 1)])
            assert content.setdefault(block, beginning) == beginning
    assert len(set(content.values())) == len(content)


@pytest.mark.parametrize("block_size", [16, 32])
def test_other_sizes_are_predicted_to_the_token(driver: Make, block_size: int):
    waves = conversations(block_size)
    recording = driver(ledger=True, blocks=61, **SETTINGS)
    play(recording, waves)
    requests, run = with_block_size(*run_of(recording.read()), block_size)
    sizes = [size * 16 // block_size for size in (20, 26, 60)]
    told = what_if(requests, run, blocks=sizes)
    assert told.reproduced in (True, None)
    exact = 0
    for size in told.sizes:
        other = driver(blocks=size.blocks + 1, block_size=block_size, **SETTINGS)
        found = play(other, waves)["found"]
        preempted = len(other.read().preemptions())
        assert (size.hit_tokens, size.num_preemptions) == (sum(found), preempted)
        assert size.query_tokens == sum(len(prompt) for wave in waves for prompt, _ in wave)
        assert size.exact == (preempted == 0)
        exact += size.exact
    assert 0 < exact < len(sizes), "a tight cache and a large one"


def test_requests_that_come_while_others_run_make_an_estimate(driver: Make):
    recording = driver(ledger=True, blocks=60, **SETTINGS)
    recording.driver.add(list(range(2, 100)), max_tokens=20)
    for _ in range(3):
        recording.driver.step()
    recording.driver.add(list(range(2, 80)), max_tokens=4)
    list(recording.driver.run())
    found = what_if(*run_of(recording.read()), blocks=[59])
    assert found.reproduced
    assert not found.sizes[0].exact
    assert "came while others ran" in " ".join(found.sizes[0].why_estimated)


def test_a_reset_is_played_too(driver: Make):
    recording = driver(ledger=True, blocks=60, **SETTINGS)
    waves = conversations(5)
    sent = play(recording, waves[:2])
    assert recording.driver.scheduler.reset_prefix_cache()
    sent["found"] += play(recording, waves[2:])["found"]
    requests, run = run_of(recording.read())
    assert sorted(set(requests.epoch.tolist())) == [0, 1]
    found = what_if(requests, run, blocks=[59])
    assert found.reproduced
    assert found.sizes[0].hit_tokens == sum(sent["found"])


def test_what_cannot_be_told_says_why(driver: Make):
    prompt = list(range(2, 60))
    for made, reason in (
        ({"ledger": False}, "core='blocks'"),
        ({"ledger": True, "groups": ("full", "sliding")}, "several KV cache groups"),
        ({"ledger": True, "enable_prefix_caching": False}, "prefix caching was off"),
    ):
        recording = driver(blocks=60, **SETTINGS, **made)
        recording.driver.add(prompt, max_tokens=2)
        list(recording.driver.run())
        with pytest.raises(NotKnown, match=reason):
            recorded_requests(recording.read())


def test_a_request_that_was_aborted_early_is_known_in_part(driver: Make):
    recording = driver(ledger=True, blocks=60, **SETTINGS)
    recording.driver.add(list(range(2, 300)), max_tokens=2, name="long")
    recording.driver.step()
    recording.driver.abort("long")
    recording.driver.add(list(range(2, 90)), max_tokens=2)
    list(recording.driver.run())
    requests, run = run_of(recording.read())
    assert requests.num_blocks.tolist() == [18, 5]
    assert requests.num_unknown == 18 - 96 // 16
    assert not what_if(requests, run, blocks=[59]).sizes[0].exact
