"""A pool of KV blocks that frees, finds and evicts as vLLM's does."""

from __future__ import annotations

from collections import OrderedDict

#: Stands for the content of a block that cannot be found.
NOTHING = -1


class Pool:
    """The blocks of one engine core.

    Free blocks stand in a queue. Blocks are handed out from its front; one that can still be found is evicted by that.
    A block that is found leaves the queue from wherever it stands. Blocks that are given back go to its end, those
    without content to its front if vLLM does so.

    Args:
        blocks: how many there are.
        empty_first: whether blocks without content go to the front.

    Attributes:
        free: the queue.
        evicted: blocks that were evicted so far.
        version: grows whenever more could be found, or more blocks are free, than before.
    """

    def __init__(self, blocks: int, *, empty_first: bool) -> None:
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(blocks))
        self._empty_first = empty_first
        self._holders = [0] * blocks
        self._content = [NOTHING] * blocks
        #: content -> its blocks, the oldest first: the same content may have been computed twice
        self._where: dict[int, dict[int, None]] = {}
        self.evicted = 0
        self.version = 0

    def find(self, contents: list[int], most: int) -> list[int]:
        """The blocks of the longest beginning of these contents that is there, at most so many."""
        where, found = self._where, []
        for content in contents[:most]:
            blocks = where.get(content)
            if not blocks:
                break
            found.append(next(iter(blocks)))
        return found

    def num_unheld(self, blocks: list[int]) -> int:
        """How many of these are free, and would be taken out of the queue."""
        holders = self._holders
        return sum(1 for block in blocks if not holders[block])

    def hold(self, blocks: list[int]) -> None:
        """A request takes blocks that it has found."""
        for block in blocks:
            if not self._holders[block]:
                del self.free[block]
            self._holders[block] += 1

    def take(self, count: int) -> list[int]:
        """Hand out free blocks."""
        taken = []
        for _ in range(count):
            block, _ = self.free.popitem(last=False)
            content = self._content[block]
            if content != NOTHING:
                self.evicted += 1
                self._content[block] = NOTHING
                blocks = self._where[content]
                del blocks[block]
                if not blocks:
                    del self._where[content]
            self._holders[block] = 1
            taken.append(block)
        return taken

    def fill(self, block: int, content: int) -> None:
        """A block is full: it can be found from now on."""
        self._content[block] = content
        self._where.setdefault(content, {})[block] = None
        self.version += 1

    def give_back(self, blocks: list[int]) -> None:
        """A request ends, or is preempted: the last block goes first."""
        holders, free = self._holders, self.free
        empty = []
        for block in reversed(blocks):
            holders[block] -= 1
            if not holders[block]:
                if self._empty_first and self._content[block] == NOTHING:
                    empty.append(block)
                else:
                    free[block] = None
        for block in reversed(empty):
            free[block] = None
            free.move_to_end(block, last=False)
        self.version += 1

    def reset(self) -> None:
        """Nothing can be found any more. The order of the queue stays."""
        self._content = [NOTHING] * len(self._content)
        self._where.clear()
        self.version += 1
