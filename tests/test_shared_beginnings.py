"""What prompts share with those before them."""

from __future__ import annotations

import random

from kvhook.core.beginnings import MOST_TOKENS, PROMPTS, Beginnings


def test_what_prompts_share_is_what_a_plain_comparison_says():
    rng = random.Random(5)
    beginnings, before = Beginnings(), list[list[int]]()
    for _ in range(300):
        prompt = [rng.randrange(3) for _ in range(rng.randrange(0, 200))]
        if before and rng.random() < 0.6:
            prompt = rng.choice(before)[: rng.randrange(200)] + prompt
        plain = max(
            (
                sum(1 for i in range(min(len(prompt), len(o))) if prompt[: i + 1] == o[: i + 1])
                for o in before[-PROMPTS:]
            ),
            default=0,
        )
        assert beginnings.shared(prompt) == plain
        if prompt:
            before.append(prompt)


def test_prompts_without_token_ids_share_nothing_and_long_ones_are_compared_in_part():
    beginnings = Beginnings()
    assert beginnings.shared(None) == 0
    assert beginnings.shared([]) == 0
    long = list(range(MOST_TOKENS + 500))
    assert beginnings.shared(long) == 0
    assert beginnings.shared(list(long)) == MOST_TOKENS
