"""Speculative decoding: drafts that are verified are counted apart from the tokens that are generated."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.core.conftest import Recording

Make = Callable[..., Recording]
MOST = 3


def test_drafts_are_their_own_kind_of_token_however_many_are_accepted(driver: Make):
    recording = driver(blocks=200, max_num_seqs=6, max_num_batched_tokens=96, max_model_len=512, seed=1)
    play, rng = recording.driver, random.Random(1)
    scheduler = play.scheduler
    scheduler.num_spec_tokens = MOST  # as a drafter of three tokens would have it
    expected: list[tuple[int, int, int]] = []
    accepted = 0
    result_of = play.result_of

    def with_drafts(output: Any) -> Any:
        """The model accepts some of the drafts, and adds a token."""
        nonlocal accepted
        result = result_of(output)
        for row, name in zip(result.sampled_token_ids, result.req_ids, strict=True):
            some = rng.randrange(len(output.scheduled_spec_decode_tokens.get(name, ())) + 1)
            row += [rng.randrange(2, 500) for _ in range(some)]
            accepted += some
        return result

    play.result_of = with_drafts
    prompts = [[rng.randrange(2, 500) for _ in range(rng.randrange(5, 150))] for _ in range(20)]
    for prompt in prompts:
        play.add(prompt, max_tokens=rng.randrange(20, 60))
    while scheduler.has_unfinished_requests():
        decoding = {r.request_id for r in scheduler.running if r.num_output_tokens}
        for request in scheduler.running:
            if request.request_id in decoding and rng.random() < 0.7:
                request.spec_token_ids = [rng.randrange(2, 500) for _ in range(rng.randrange(1, MOST + 1))]
        output = play.schedule()
        tokens = output.num_scheduled_tokens
        drafts = {name: len(some) for name, some in output.scheduled_spec_decode_tokens.items()}
        prefill = sum(count for name, count in tokens.items() if name not in decoding)
        decode = sum(count - drafts.get(name, 0) for name, count in tokens.items() if name in decoding)
        expected.append((prefill, decode, sum(drafts.values())))
        play.update(output)
    cores = recording.read()
    steps, requests = cores.steps(), cores.requests()
    columns = ("num_prefill_tokens", "num_decode_tokens", "num_spec_tokens")
    assert list(zip(*(steps[c].tolist() for c in columns), strict=True)) == expected
    assert steps["num_recomputed_tokens"].sum() == 0
    assert steps["num_spec_tokens"].sum() > accepted > 100
    assert steps["num_prefill_tokens"].sum() == requests["num_prefill_tokens"].sum()
    assert requests["num_prefill_tokens"].sum() + requests["num_cached_tokens"].sum() == sum(map(len, prompts))
    # a step gives each request that decodes one token of its own, and what it accepts
    assert (requests["num_generation_tokens"] - 1).sum() <= steps["num_decode_tokens"].sum() + accepted
    together = np.sum([steps[c] for c in (*columns, "num_recomputed_tokens")], axis=0)
    assert (together == steps["num_scheduled_tokens"]).all()
