"""Random requests with shared prefixes, and caches that are asked block by block."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from kvhook.whatif.requests import BlockRequests, make_requests


class Sent:
    """Requests as lists of tokens, and as `BlockRequests`."""

    def __init__(self, seed: int, count: int, block_size: int, *, longest: int = 80, waves: int = 1) -> None:
        rng = random.Random(seed)
        self.block_size = block_size
        trunk = [rng.randrange(2, 500) for _ in range(longest)]
        stems = [trunk[: rng.randrange(1, longest)] + [rng.randrange(2, 500) for _ in range(20)] for _ in range(4)]
        self.prompts: list[list[int]] = []
        self.outputs: list[list[int]] = []
        self.wave, self.delay = [], []
        for number in range(count):
            prompt = [rng.randrange(2, 500) for _ in range(rng.randrange(1, 40))]
            if rng.random() < 0.8:
                prompt = rng.choice(stems) + prompt
            if self.prompts and rng.random() < 0.2:  # the next turn of a conversation
                old = rng.randrange(len(self.prompts))
                prompt = self.prompts[old] + self.outputs[old] + prompt[:10]
            self.prompts.append(prompt)
            self.outputs.append([rng.randrange(2, 500) for _ in range(rng.randrange(1, 30))])
            self.wave.append(number * waves // count)
            self.delay.append(rng.randrange(10) if seed % 2 else 0)
        for wave in range(waves):
            mine = [i for i in range(count) if self.wave[i] == wave]
            for i, delay in zip(mine, sorted(self.delay[i] for i in mine), strict=True):
                self.delay[i] = delay - min(self.delay[j] for j in mine) if i == mine[0] else delay
            self.delay[mine[0]] = 0

    def blocks(self, number: int) -> list[tuple[int, ...]]:
        """The full blocks of a request, each with all before it."""
        tokens = (self.prompts[number] + self.outputs[number])[:-1]
        size = self.block_size
        return [tuple(tokens[: end + size]) for end in range(0, len(tokens) - size + 1, size)]

    def requests(self, **more: Any) -> BlockRequests:
        known: dict[tuple[int, ...], int] = {}
        ids = [[known.setdefault(block, len(known)) for block in self.blocks(i)] for i in range(len(self.prompts))]
        return make_requests(
            self.block_size,
            ids,
            [len(p) for p in self.prompts],
            [len(o) for o in self.outputs],
            **{"wave": self.wave, "delay": self.delay, "arrival": np.arange(len(ids)), **more},
        )


def lru(requests: BlockRequests, blocks: int) -> list[int]:
    """Blocks that each request finds in a least-recently-used cache, asked block by block; the last is the oldest."""
    cache: dict[int, None] = {}
    found = []
    asked = requests.num_looked_up_blocks.tolist()
    for number in range(len(requests)):
        mine = requests.ids[requests.offsets[number] : requests.offsets[number + 1]].tolist()
        hits = 0
        while hits < min(len(mine), asked[number]) and mine[hits] in cache:
            hits += 1
        found.append(hits)
        for block in mine + mine[::-1]:  # first come what is found and what is computed, then all are given back
            cache.pop(block, None)
            cache[block] = None
            if len(cache) > blocks:
                del cache[next(iter(cache))]
    return found
