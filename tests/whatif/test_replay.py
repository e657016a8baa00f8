"""The replay does what a reference model of vLLM's scheduler does, which goes step by step and token by token."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from kvhook.whatif.replay import Rules, replay
from tests.core.reference import Model, Request
from tests.whatif.workloads import Sent


def played(sent: Sent, model: Model) -> dict[str, Any]:
    """What the reference model makes of the requests; they come as `sent` says."""
    done, step = [0] * len(sent.prompts), 0
    requests = [Request(i, functools.partial(_tokens, sent, done, i)) for i in range(len(sent.prompts))]
    unfinished: set[int] = set()
    steps = peak = 0
    for wave in sorted(set(sent.wave)):
        coming = sorted((sent.delay[i], i) for i in range(len(requests)) if sent.wave[i] == wave)
        begin = step
        while coming or unfinished:
            if not unfinished and coming[0][0] + begin > step:
                begin = step - coming[0][0]
            while coming and coming[0][0] + begin <= step:
                number = coming.pop(0)[1]
                model.waiting.append(requests[number])
                unfinished.add(number)
            scheduled = model.schedule()
            peak = max(peak, sum(1 for refs in model.refs.values() if refs))
            steps += bool(scheduled)
            for number in scheduled:
                if requests[number].computed >= len(sent.prompts[number]) + done[number]:
                    done[number] += 1
                    if done[number] == len(sent.outputs[number]):
                        model.finish(requests[number])
                        unfinished.discard(number)
            step += 1
    first = {lookup.request: lookup.found for lookup in model.lookups if not lookup.resumed}
    return {
        "found": [first[i] for i in range(len(requests))],
        "num_resumed_found_tokens": sum(lookup.found for lookup in model.lookups if lookup.resumed),
        "num_preemptions": len(model.preemptions),
        "num_evicted": sum(event.what == "evict" for event in model.events),
        "num_steps": steps,
        "peak": peak,
        "stuck": 0,
    }


def _tokens(sent: Sent, done: list[int], number: int) -> list[int]:
    return sent.prompts[number] + sent.outputs[number][: done[number]]


@pytest.mark.parametrize("empty_first", [True, False])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_the_replay_agrees_with_the_reference_model(seed: int, whole: bool, empty_first: bool):
    size = [4, 8, 1, 16][seed % 4]
    sent = Sent(seed, 60, size, waves=[1, 5, 60][seed % 3])
    requests = sent.requests()
    budget, places = [(64, 8), (200, 16), (33, 5)][seed % 3]
    tight = requests.longest + [2, 30, 8, 60][seed // 2]
    preempted = 0
    for blocks in (tight, 2 * tight, 6 * tight):
        model = Model(blocks, size, budget, places, whole=whole, empty_first=empty_first)
        expected = played(sent, model)
        rules = Rules(budget, places, whole_prompt_must_fit=whole, empty_blocks_first=empty_first)
        got = replay(requests, blocks, rules)
        assert {name: getattr(got, name) for name in expected} | {"found": got.found.tolist()} == expected
        assert got.num_found_tokens == sum(expected["found"])
        preempted += got.num_preemptions
    assert preempted or seed % 3 == 2 or seed // 2 > 0, "the cache is never tight"


def test_requests_that_never_fit_are_counted_and_the_others_go_on():
    sent = Sent(2, 20, 4)
    requests = sent.requests()
    got = replay(requests, requests.longest - 1, Rules(64, 4))
    assert 0 < got.stuck < 20
    assert (got.found < 0).sum() <= got.stuck


def test_an_endless_cache_finds_what_is_there_when_requests_come_one_by_one():
    from kvhook.whatif.distances import lru_curve

    sent = Sent(5, 60, 4, waves=60)
    requests = sent.requests()
    got = replay(requests, 10_000, Rules(64, 8))
    assert got.num_found_tokens == lru_curve(requests).ceiling * 4
    assert got.num_evicted == got.num_preemptions == 0


def test_a_reset_empties_the_cache():
    sent = Sent(4, 40, 4, waves=40)
    whole = replay(sent.requests(), 10_000, Rules()).num_found_tokens
    halves = replay(sent.requests(epoch=[i // 20 for i in range(40)]), 10_000, Rules()).num_found_tokens
    apart = sum(
        replay(sent.requests().select(part), 10_000, Rules()).num_found_tokens for part in (range(20), range(20, 40))
    )
    assert halves == apart < whole


def test_engine_cores_have_caches_of_their_own():
    sent = Sent(6, 40, 4, waves=40)
    both = replay(sent.requests(core=[i % 2 for i in range(40)]), 300, Rules())
    each = [replay(sent.requests().select(range(first, 40, 2)), 300, Rules()) for first in (0, 1)]
    assert both.num_found_tokens == sum(one.num_found_tokens for one in each)
    assert both.peak == max(one.peak for one in each)
