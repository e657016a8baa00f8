"""Which hits the samples of one prompt (``n > 1``) had from each other."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_Ints = npt.NDArray[np.int64]


class SiblingHits(NamedTuple):
    """Tokens that the samples of one prompt (``n > 1``) found.

    Args:
        prompts: prompts with several samples.
        siblings: cached tokens that samples had from other samples of their prompt.
        others: cached tokens of all requests that other prompts, or earlier runs of the same one, had left there.
    """

    prompts: int
    siblings: int
    others: int


class _Id:
    """A request id: how often each sample of it has come, and (samples, tokens, least tokens) of each use of it: an id
    that is used again is another prompt."""

    __slots__ = ("seen", "uses")

    def __init__(self) -> None:
        self.seen: dict[int, int] = {}
        self.uses: list[tuple[int, int, int]] = []


class Siblings:
    """Tells the hits of samples among each other from hits across prompts, from an engine's requests as they come.

    The sample that is looked up first finds what others had left in the cache, and no sibling has computed anything
    yet. Each of the n samples would find at least that much without the others: ``n * min(num_cached_tokens)`` of
    their hits need no sibling, and the rest does. It is an estimate where blocks are evicted between the look-ups of
    two samples, or where another prompt brings the same beginning meanwhile. An aborted sample whose cached tokens
    are not known is left out, and so is one that comes more than `WINDOW` requests after its siblings.
    """

    #: So many prompts are remembered.
    WINDOW = 1 << 16

    def __init__(self) -> None:
        #: whether a prompt had several samples
        self.some = False
        self._prompts = self._siblings = self._everything = 0
        self._before: deque[list[_Ints]] = deque()  # requests before the first prompt with several samples
        self._before_count = 0
        self._ids: dict[int, _Id] = {}

    def take(self, request_id: _Ints, sample: _Ints, cached: _Ints) -> None:
        """Take in requests."""
        self.some |= bool((sample > 0).any())
        known = cached >= 0
        self._everything += int(cached[known].sum())
        known &= (request_id >= 0) & (sample >= 0)
        columns = [column[known] for column in (request_id, sample, cached)]
        if self.some:
            while self._before:
                self._group(self._before.popleft())
            self._group(columns)
            return
        self._before.append(columns)
        self._before_count += len(columns[0])
        while self._before_count - len(self._before[0][0]) > self.WINDOW:
            self._before_count -= len(self._before.popleft()[0])

    def _group(self, columns: list[_Ints]) -> None:
        for request_id, sample, cached in zip(*(column.tolist() for column in columns), strict=True):
            known = self._ids.get(request_id)
            if known is None:
                known = self._ids[request_id] = _Id()
                if len(self._ids) > self.WINDOW:
                    del self._ids[next(iter(self._ids))]
            use = known.seen.get(sample, 0)
            known.seen[sample] = use + 1
            if use == len(known.uses):
                known.uses.append((1, cached, cached))
                continue
            count, tokens, least = known.uses[use]
            new = count + 1, tokens + cached, min(least, cached)
            known.uses[use] = new
            self._prompts += count == 1
            self._siblings += (new[1] - new[0] * new[2]) - (tokens - count * least)

    def add(self, other: Siblings) -> None:
        """Put another engine's to these."""
        self.some |= other.some
        self._prompts += other._prompts
        self._siblings += other._siblings
        self._everything += other._everything

    def hits(self) -> SiblingHits | None:
        """What they found; None if no prompt has several samples."""
        if not self.some:
            return None
        return SiblingHits(self._prompts, self._siblings, self._everything - self._siblings)
