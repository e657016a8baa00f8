"""The work: batches of requests whose cache usage and hit rate really move.

A batch is what one call of ``generate`` would bring. Sizes and lengths are drawn anew for each batch, so that usage
goes up and down and its peak is a matter of some steps; one batch in sixty (at least one) is of long prompts that
share nothing and fills the cache, so that requests wait and are preempted. The others begin with one of three system
prompts, which are shorter in the second and shortest in the last third of the run: the hit rate falls, as it does in
runs through material that is sorted in some way.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

#: The cache is small, so that a tiny model fills it: 127 usable blocks of 32 tokens.
ENGINE = {"block_size": 32, "num_gpu_blocks_override": 128, "max_num_seqs": 16, "max_model_len": 1024}

_SYSTEM_TOKENS = (224, 96, 40)
_VOCABULARY = 500
_FULL_ONE_IN = 60


class Batch(NamedTuple):
    """Requests that are sent together: their prompts, and how many tokens each is to give."""

    prompts: list[list[int]]
    tokens: list[int]


def batches(count: int, seed: int) -> Iterator[Batch]:
    """The same batches for the same arguments."""
    rng = random.Random(seed)
    systems = [[_tokens(rng, length) for _ in range(3)] for length in _SYSTEM_TOKENS]
    full = _places(rng, count)
    for i in range(count):
        if i in full:
            yield Batch([_tokens(rng, rng.randrange(250, 420)) for _ in range(14)], [rng.randrange(40, 70)] * 14)
            continue
        size, longest, most = rng.randrange(2, 15), rng.randrange(20, 250), rng.randrange(15, 70)
        shared = systems[len(systems) * i // count]
        prompts = [rng.choice(shared) + _tokens(rng, rng.randrange(10, longest)) for _ in range(size)]
        yield Batch(prompts, [rng.randrange(12, most) for _ in range(size)])


def _places(rng: random.Random, count: int) -> set[int]:
    """Which batches fill the cache: at least one."""
    return set(rng.sample(range(count), max(1, count // _FULL_ONE_IN)))


def _tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(2, _VOCABULARY) for _ in range(count)]
