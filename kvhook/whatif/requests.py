"""The requests of a run as lists of block ids: what every calculation of this package starts from.

An id stands for a full KV block together with all that comes before it, so that equal ids are equal prefixes, and a
block's id says which block must come before it. `BlockRequests.checked` makes sure of that for ids from elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class BlockRequests:
    """Requests in the order in which they were looked up.

    Attributes:
        block_size: tokens of a block.
        offsets: request ``i`` has ``ids[offsets[i]:offsets[i + 1]]``.
        ids: its full blocks in order: those of the prompt, then those of what was generated. Ids count from 0.
        num_prompt_tokens: of each request.
        num_generation_tokens: of each request.
        looked_up: whether it was looked up in the prefix cache at all.
        t_ns: when it came, in nanoseconds.
        arrival: its place in the order of arrival.
        wave: number of the busy time in which it came; one begins when a request comes and none is being worked on.
        delay: how many steps after the begin of its busy time it came.
        epoch: how often the cache had been reset before.
        core: number of the engine core it ran on.
        found: tokens that it found in the run itself; -1 where that is not known.
        names: what else is known of single requests, by the name of the field: ``session``, ``label``.
        num_unknown: blocks whose content is not known, because they were never computed. Nothing finds them.
    """

    block_size: int
    offsets: Ints
    ids: Ints
    num_prompt_tokens: Ints
    num_generation_tokens: Ints
    looked_up: npt.NDArray[np.bool_]
    t_ns: Ints
    arrival: Ints
    wave: Ints
    delay: Ints
    epoch: Ints
    core: Ints
    found: Ints
    names: dict[str, list[Any]] = field(default_factory=dict)
    num_unknown: int = 0

    def __len__(self) -> int:
        return len(self.num_prompt_tokens)

    @property
    def num_blocks(self) -> Ints:
        """Full blocks of each request."""
        return np.diff(self.offsets)

    @property
    def num_looked_up_blocks(self) -> Ints:
        """How many blocks of each request can be found: vLLM computes the last token of a prompt in any case."""
        return np.where(self.looked_up, (self.num_prompt_tokens - 1) // self.block_size, 0)

    @property
    def query_tokens(self) -> int:
        """Tokens looked up, as vLLM counts them: the whole prompts."""
        return int(self.num_prompt_tokens[self.looked_up].sum())

    @property
    def num_distinct(self) -> int:
        """Different blocks."""
        return int(self.ids.max(initial=-1)) + 1

    @property
    def longest(self) -> int:
        """Blocks that the longest request holds at its end, the partly filled one included."""
        computed = self.num_prompt_tokens + np.maximum(self.num_generation_tokens - 1, 0)
        return int((-(-computed // self.block_size)).max(initial=0))

    def select(self, places: Sequence[int] | Ints) -> BlockRequests:
        """Some of the requests, in this order."""
        places = np.asarray(places, np.int64)
        counts = self.num_blocks[places]
        offsets = _offsets(counts)
        at = np.arange(offsets[-1]) - np.repeat(offsets[:-1] - self.offsets[places], counts)
        same = ["num_prompt_tokens", *_ARRAYS]
        return replace(
            self,
            offsets=offsets,
            ids=self.ids[at],
            **{name: getattr(self, name)[places] for name in same},
            names={name: [values[i] for i in places.tolist()] for name, values in self.names.items()},
        )

    def in_this_order(self) -> BlockRequests:
        """The same, as if each had come when the one before it had ended."""
        order = np.arange(len(self))
        return replace(self, arrival=order, wave=order)

    def with_block_size(self, block_size: int) -> BlockRequests:
        """The same requests in longer blocks: a longer block is known by the last of the short ones in it.

        Raises:
            ValueError: it is no multiple of the block size.
        """
        times, rest = divmod(block_size, self.block_size)
        if rest or times < 1:
            raise ValueError(f"blocks of {block_size} tokens: these are known in multiples of {self.block_size} only")
        if times == 1:
            return self
        within = np.arange(len(self.ids)) - np.repeat(self.offsets[:-1], self.num_blocks)
        ids = np.unique(self.ids[within % times == times - 1], return_inverse=True)[1].astype(np.int64)
        return replace(self, block_size=block_size, offsets=_offsets(self.num_blocks // times), ids=ids)

    def reordered(self, *, across: bool = False) -> BlockRequests:
        """The same requests with those next to each other that share a prefix: longest common prefix first.

        The order is that of a walk through the tree of prefixes, which visits first the branch with most to share.

        Args:
            across: whether a request may go before one that came in an earlier busy time. Without it only requests
                are swapped that were there together, as the prompts of one call of ``LLM.generate`` are.
        """
        weight = np.bincount(self.ids, minlength=self.num_distinct)
        # children are visited by how often they occur, then by their ids: a stable order of the paths
        rank = np.empty(len(weight), np.int64)
        rank[np.lexsort((np.arange(len(weight)), -weight))] = np.arange(len(weight))
        keyed = rank[self.ids]
        keys = [
            (
                int(self.core[i]),
                int(self.epoch[i]),
                0 if across else int(self.wave[i]),
                keyed[self.offsets[i] : self.offsets[i + 1]].astype(">i8").tobytes(),
            )
            for i in range(len(self))
        ]
        order = sorted(range(len(self)), key=lambda i: (keys[i], i))
        found = self.select(order)
        # they come in the new order, those of a busy time all at once
        wave = np.zeros(len(self), np.int64) if across else found.wave
        return replace(found, arrival=np.arange(len(self)), wave=wave, delay=np.zeros(len(self), np.int64))

    def checked(self) -> BlockRequests:
        """The same, with ids of which each comes behind one block only: where the same id came behind different blocks
        it stood for a block without what is before it, and gets an id for each."""
        before = np.concatenate(([-1], self.ids[:-1])) if len(self.ids) else self.ids
        starts = self.offsets[:-1][self.num_blocks > 0]
        before[starts] = -1
        above_of = np.full(self.num_distinct, -1, np.int64)
        above_of[self.ids] = before
        if (above_of[self.ids] == before).all():
            return self
        known: dict[tuple[int, int], int] = {}
        ids, given = self.ids.tolist(), np.empty(len(self.ids), np.int64)
        for first, end in zip(self.offsets[:-1].tolist(), self.offsets[1:].tolist(), strict=True):
            above = -1
            for place in range(first, end):
                above = given[place] = known.setdefault((above, ids[place]), len(known))
        return replace(self, ids=given)


def make_requests(
    block_size: int, blocks: Sequence[Any], num_prompt_tokens: Any, num_generation_tokens: Any = None, **more: Any
) -> BlockRequests:
    """Requests from lists of block ids of any kind, sent one after the other unless `more` says otherwise.

    Args:
        block_size: tokens of a block.
        blocks: for each request the ids of its full blocks.
        num_prompt_tokens: of each request.
        num_generation_tokens: of each request; 1 if it is not given.
        more: other attributes of `BlockRequests`.
    """
    counts = np.fromiter(map(len, blocks), np.int64, len(blocks))
    flat = np.concatenate([np.asarray(b, np.int64) for b in blocks]) if len(blocks) else np.empty(0, np.int64)
    return requests_from(block_size, flat, counts, num_prompt_tokens, num_generation_tokens, **more)


def requests_from(
    block_size: int, flat: Ints, counts: Ints, num_prompt_tokens: Any, num_generation_tokens: Any = None, **more: Any
) -> BlockRequests:
    """The same from all ids in one array, and how many of them each request has."""
    count = len(counts)
    order = np.arange(count)
    values: dict[str, Any] = {
        "num_generation_tokens": np.ones(count, np.int64) if num_generation_tokens is None else num_generation_tokens,
        "looked_up": np.ones(count, np.bool_),
        "t_ns": order,
        "arrival": order,
        "wave": order,
        "delay": np.zeros(count, np.int64),
        "epoch": np.zeros(count, np.int64),
        "core": np.zeros(count, np.int64),
        "found": np.full(count, -1),
        **more,
    }
    arrays: dict[str, Any] = {
        n: np.asarray(v, np.bool_ if n == "looked_up" else np.int64) for n, v in values.items() if n in _ARRAYS
    }
    return BlockRequests(
        block_size=block_size,
        offsets=_offsets(counts),
        ids=np.unique(flat, return_inverse=True)[1].astype(np.int64).reshape(-1),
        num_prompt_tokens=np.asarray(num_prompt_tokens, np.int64),
        **arrays,
        **{n: v for n, v in values.items() if n not in _ARRAYS},
    )


#: The attributes that are arrays with a value for each request, but for the first.
_ARRAYS = ("num_generation_tokens", "looked_up", "t_ns", "arrival", "wave", "delay", "epoch", "core", "found")


def _offsets(counts: Ints) -> Ints:
    return np.concatenate(([0], np.cumsum(counts))).astype(np.int64)


def join(runs: Sequence[tuple[BlockRequests, int]]) -> BlockRequests:
    """The requests of several runs in the order in which they came. Their blocks are different ones: each run has a key
    of its own, so that nobody can tell whether two of them saw the same prompt.

    Args:
        runs: the requests, and what is to be added to their times to have them on one clock.

    Raises:
        ValueError: their blocks are of different sizes.
    """
    sizes = {requests.block_size for requests, _ in runs}
    if len(sizes) != 1:
        raise ValueError(f"the runs have blocks of different sizes: {sorted(sizes)}")
    columns: dict[str, list[Ints]] = {}
    first_id = first_core = first_wave = 0
    for requests, shift in runs:
        moved = {
            "num_blocks": requests.num_blocks,
            "ids": requests.ids + first_id,
            "t_ns": requests.t_ns + shift,
            "core": requests.core + first_core,
            "wave": requests.wave + first_wave,
        }
        for name in ("num_blocks", "ids", "num_prompt_tokens", *_ARRAYS):
            columns.setdefault(name, []).append(moved[name] if name in moved else getattr(requests, name))
        first_id += requests.num_distinct
        first_core += int(requests.core.max(initial=-1)) + 1
        first_wave += int(requests.wave.max(initial=-1)) + 1
    together: dict[str, Any] = {name: np.concatenate(parts) for name, parts in columns.items()}
    counts = together.pop("num_blocks")
    whole = BlockRequests(
        block_size=sizes.pop(),
        offsets=_offsets(counts),
        num_unknown=sum(requests.num_unknown for requests, _ in runs),
        **together,
    )
    order = np.argsort(whole.t_ns, kind="stable")
    return replace(whole.select(order), arrival=np.arange(len(order)))
