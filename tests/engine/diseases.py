"""What makes a real engine suffer from each disease that a diagnosis knows, and what leaves it healthy.

A case is a name, options of the engine and calls. What is expected follows from the options and prompts alone.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

from tests.workloads import tokens

#: Room for everything.
ROOMY = {"block_size": 32, "num_gpu_blocks_override": 400, "max_num_seqs": 24, "max_model_len": 1024}


class Case(NamedTuple):
    """What is sent to an engine, call by call: prompts, and what the sampling of each is to be.

    Args:
        found: findings that there must be.
        options: of the engine.
        calls: prompts and sampling, one for all of a call or one for each prompt.
        beside: findings that may be there as well.
    """

    found: set[str]
    options: dict[str, Any]
    calls: list[tuple[list[list[int]], Any]]
    beside: frozenset[str] = frozenset()


def diseases() -> dict[str, Case]:
    """Name -> case. Each is made anew, from the same seed."""
    rng = random.Random(3)
    short = {"max_tokens": 4, "ignore_eos": True}
    long = {"max_tokens": 48, "ignore_eos": True}
    crowd = [tokens(rng, rng.randrange(60, 301)) for _ in range(40)]
    groups = [tokens(rng, 160) for _ in range(6)]
    turns = [group + tokens(rng, 20) for _ in range(4) for group in groups]
    system = tokens(rng, 128)
    talkers = [tokens(rng, 40) for _ in range(3)]
    readers = [tokens(rng, 1500) for _ in range(10)]
    return {
        "too few blocks": Case(
            {"cache_too_small", "preemption_thrash"},
            {**ROOMY, "num_gpu_blocks_override": 60},
            [(crowd, {"max_tokens": 64, "ignore_eos": True})],
            frozenset({"evicted_too_early", "order_spoils_sharing", "prefix_cache_useless"}),
        ),
        "groups that take turns": Case(
            {"evicted_too_early", "order_spoils_sharing"},
            {**ROOMY, "num_gpu_blocks_override": 24, "max_model_len": 512, "max_num_seqs": 2},
            [(turns, short)],
            frozenset({"cache_too_small", "limited_by_max_num_seqs"}),
        ),
        "one after the other": Case(
            {"evicted_too_early"},
            {**ROOMY, "num_gpu_blocks_override": 24, "max_model_len": 512},
            [([prompt], short) for prompt in turns],
        ),
        "prefix caching off": Case(
            {"prefix_cache_off"},
            {**ROOMY, "enable_prefix_caching": False},
            [([system + tokens(rng, 30) for _ in range(20)], long)],
        ),
        "thirty shared tokens": Case(
            {"shared_beginning_below_block"},
            ROOMY,
            [([system[:30] + tokens(rng, 40) for _ in range(24)], long)],
        ),
        "prompt logprobs": Case(
            {"never_looked_up"},
            ROOMY,
            [([system + tokens(rng, 30) for _ in range(12)], long | {"prompt_logprobs": 1})],
        ),
        "nothing in common": Case({"prefix_cache_useless"}, ROOMY, [([tokens(rng, 90) for _ in range(24)], long)]),
        "samples": Case(
            {"hits_only_from_siblings"},
            {**ROOMY, "max_num_seqs": 64},
            [([tokens(rng, 100) for _ in range(8)], long | {"n": 4, "temperature": 1.0})],
        ),
        "two seats": Case(
            {"limited_by_max_num_seqs"},
            {**ROOMY, "max_num_seqs": 2, "num_gpu_blocks_override": 60},
            [([system + tokens(rng, 20) for _ in range(16)], {"max_tokens": 12, "ignore_eos": True})],
        ),
        "few tokens a step": Case(
            {"limited_by_token_budget"},
            {**ROOMY, "max_num_batched_tokens": 64},
            [([system + tokens(rng, 200) for _ in range(20)], short)],
            frozenset({"prefill_holds_up_decode"}),
        ),
        "readers among talkers": Case(
            {"prefill_holds_up_decode"},
            {**ROOMY, "max_model_len": 2048, "max_num_batched_tokens": 2048, "max_num_seqs": 4},
            [
                (
                    [*talkers, *readers],
                    [{"max_tokens": 40, "ignore_eos": True}] * 3 + [{"max_tokens": 1}] * len(readers),
                )
            ],
            frozenset({"limited_by_max_num_seqs", "limited_by_token_budget"}),
        ),
        "a large cache": Case(
            {"cache_mostly_empty"},
            {**ROOMY, "num_gpu_blocks_override": 2000},
            [([system + tokens(rng, 20) for _ in range(4)], {"max_tokens": 130, "ignore_eos": True})],
        ),
    }


def healthy(seed: int) -> Case:
    """Prompts that share a beginning, and a cache that suits them: nothing to be said."""
    rng = random.Random(1000 + seed)
    system = tokens(rng, 32 * rng.randrange(2, 6))
    calls: list[tuple[list[list[int]], Any]] = []
    for _ in range(rng.randrange(2, 4)):
        prompts = [system + tokens(rng, rng.randrange(10, 70)) for _ in range(rng.randrange(10, 20))]
        calls.append((prompts, {"max_tokens": rng.randrange(16, 48), "ignore_eos": True}))
    return Case(set(), {**ROOMY, "num_gpu_blocks_override": 160}, calls)
