"""Block arithmetic: what prefix caching must give, from the prompts alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def prefix_hits(prompts: Iterable[Sequence[int]], block_size: int) -> list[int]:
    """The tokens that each prompt finds in a prefix cache that is empty at first and large enough for all of them.

    A prompt finds the whole blocks of its longest beginning that an earlier prompt had, but never its last token,
    which has to be computed to get on. It does not matter whether the earlier one is finished.

    Args:
        prompts: token ids, in the order in which they are sent.
        block_size: tokens per KV block.
    """
    seen: set[tuple[int, ...]] = set()
    hits = []
    for prompt in prompts:
        ends = range(block_size, len(prompt) + 1, block_size)
        beginnings = [tuple(prompt[:end]) for end in ends]
        found = next((i for i, beginning in enumerate(beginnings) if beginning not in seen), len(beginnings))
        hits.append(block_size * min(found, (len(prompt) - 1) // block_size))
        seen.update(beginnings)
    return hits


def blocks_of(num_tokens: int, block_size: int) -> int:
    """The KV blocks that a request with so many tokens in the cache holds."""
    return -(-num_tokens // block_size)
