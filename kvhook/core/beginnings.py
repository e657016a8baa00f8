"""How much of its beginning a prompt shares with those just before it, block or no block.

The prefix cache finds whole blocks only, so that what prompts share below a block is seen nowhere in it. Here token ids
are compared inside the engine core's process. Only the length of what is shared leaves it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

#: A prompt is compared with so many before it: enough for several groups that take turns.
PROMPTS = 16
#: So many tokens are compared at most, and so many at a time: slices of lists are compared in C.
MOST_TOKENS, _AT_A_TIME = 8192, 64


class Beginnings:
    """The last prompts, and what a new one shares with them. Lists are kept as they are; nothing is copied."""

    def __init__(self) -> None:
        self._prompts: deque[Sequence[int]] = deque(maxlen=PROMPTS)

    def shared(self, prompt: Any) -> int:
        """The longest beginning that a prompt shares with one before it; from then on it is one of them.

        Args:
            prompt: token ids; without them (prompts may be embeddings) nothing is shared.
        """
        if not prompt:
            return 0
        most = 0
        for other in self._prompts:
            if prompt[most : most + 1] == other[most : most + 1]:  # else it shares no more than is known already
                most = max(most, common(prompt, other))
        self._prompts.append(prompt)
        return most


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two prompts share at their beginnings."""
    end = min(len(a), len(b), MOST_TOKENS)
    at = 0
    while at < end and a[at : at + _AT_A_TIME] == b[at : at + _AT_A_TIME]:
        at += _AT_A_TIME
    if at >= end:
        return end
    while at < end and a[at] == b[at]:
        at += 1
    return at
