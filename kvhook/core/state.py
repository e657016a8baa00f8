"""The numbers of an engine core while it is recorded: what its taps count, and whoever writes records asks for."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvhook.core.scheduled import Scheduled


class CoreState:
    """What the counting in Python counts in. The extension has one of its own, with the same attributes
    (``native.CoreState``), in which its taps count as well.

    Attributes:
        n: number of the next record.
        step: number of the step that is under way, or of the next one.
        num_preempted, num_finished: preemptions and ended requests, since the counts were last taken.
        updated: number of the step whose ``update_from_output`` was the last; -1 before the first.
        stats_made: how many stats the core has made.
        own_ns: what kvhook took in the step before.
        allocated, freed, reused, revived, evicted, resets: blocks, since the counts were last taken.
        cached: free blocks that can be found by their content, now.
        shared: how often blocks are held beyond the first time, all together, now.
        lookups, looked_up, found: look-ups, and tokens looked up and found by requests that were then scheduled, since
            the counts were last taken.
        on: False once the counting is over: somebody else's wrapper may still be over a tap, and call it.
        inside: whether an ``update_from_output`` is under way.
        looked: whether a request has been looked up since the last ``schedule`` began.
        behalf: the request that the block manager works for, if it is known.
        pending: steps that have been scheduled and not been written.
    """

    __slots__ = (
        "allocated",
        "behalf",
        "cached",
        "evicted",
        "found",
        "freed",
        "inside",
        "looked",
        "looked_up",
        "lookups",
        "n",
        "num_finished",
        "num_preempted",
        "on",
        "own_ns",
        "pending",
        "push",
        "resets",
        "reused",
        "revived",
        "shared",
        "stats_made",
        "step",
        "updated",
    )

    def __init__(self) -> None:
        self.n = self.step = self.num_preempted = self.num_finished = self.stats_made = 0
        self.own_ns = self.updated = -1
        self.allocated = self.freed = self.reused = self.revived = self.evicted = self.resets = 0
        self.cached = self.shared = self.lookups = self.looked_up = self.found = 0
        self.on = self.inside = self.looked = False
        self.behalf: Any = None
        self.pending: deque[Scheduled] = deque()
        self.push = self.pending.append

    def take(self) -> tuple[int, ...]:
        """What was counted since the last call, from num_preempted to resets: see `CORE_COUNTS` in ``_step/core.h``."""
        counts = (
            self.num_preempted,
            self.num_finished,
            self.allocated,
            self.freed,
            self.reused,
            self.revived,
            self.evicted,
            self.lookups,
            self.looked_up,
            self.found,
            self.resets,
        )
        self.num_preempted = self.num_finished = 0
        self.allocated = self.freed = self.reused = self.revived = self.evicted = self.resets = 0
        self.lookups = self.looked_up = self.found = 0
        return counts
