"""The most that a cache of a size can find, whatever it evicts: Belady's optimum, with the future known."""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt

from kvhook.whatif.requests import BlockRequests, Ints


def optimum(requests: BlockRequests, blocks: int) -> int:
    """Blocks that are found at most with room for so many.

    A block is kept from one use to the next or not at all; of those that are kept, one too many costs the one whose
    next use is farthest away. What running requests need is left out, so that no engine reaches more.

    Args:
        requests: of the run.
        blocks: size of the cache.
    """
    within = np.arange(len(requests.ids)) - np.repeat(requests.offsets[:-1], requests.num_blocks)
    counted = within < np.repeat(requests.num_looked_up_blocks, requests.num_blocks)
    lives = requests.core * (int(requests.epoch.max(initial=0)) + 1) + requests.epoch
    of_id = np.repeat(lives, requests.num_blocks)
    found = 0
    for life in np.unique(lives).tolist():
        mine = of_id == life
        found += _optimum(requests.ids[mine], counted[mine], blocks)
    return found


def _optimum(ids: Ints, counted: npt.NDArray[np.bool_], blocks: int) -> int:
    count = len(ids)
    order = np.lexsort((np.arange(count), ids))
    same = ids[order][1:] == ids[order][:-1]
    after = np.full(count, -1, np.int64)
    after[order[:-1][same]] = order[1:][same]
    # keeping a block is worth something only if its next use is a look-up
    worth = (after >= 0) & counted[after]
    nexts = np.where(worth, after, -1).tolist()
    kept: list[int] = []  # next uses, farthest first
    size = found = 0
    held = bytearray(count)
    for now, then in enumerate(nexts):
        if held[now]:
            found += 1
            size -= 1
        if then >= 0:
            heapq.heappush(kept, -then)
            held[then] = 1
            size += 1
            if size > blocks:
                # what lies in the past was used and has gone: everything else is farther
                held[-heapq.heappop(kept)] = 0
                size -= 1
    return found
