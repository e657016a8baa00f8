"""What a hooked step costs where the publisher cannot see it: around itself."""

from __future__ import annotations

import functools
import mmap
from collections.abc import Callable
from typing import Any

import wrapt

from kvhook import hooks


@functools.cache
def call_overhead_ns() -> int:
    """What a step costs on this machine beyond what the publisher can measure from inside, in nanoseconds: the wrapped
    call, and the hand-over of the stats.

    It is measured with the processor's own caches cold, as they are after a forward pass: 0.5 us when warm, 5 to 10 so.
    Takes some 10 ms, once in a process.
    """
    given: Any = None

    def record(scheduler_stats: Any = None, iteration_stats: Any = None, mm_cache_stats: Any = None, **_: Any) -> None:
        nonlocal given
        given = scheduler_stats, iteration_stats, mm_cache_stats

    class Bare:
        def step(self) -> None:
            return None

    class Wrapped:
        def _step(self) -> None:
            record(scheduler_stats=None, iteration_stats=None, mm_cache_stats=None)

        step = wrapt.FunctionWrapper(_step, hooks.on_step)

    bare, hooked = Bare(), Wrapped()
    hooks._steps[id(hooked)] = lambda start, end: None
    try:
        # a map of its own: giving 8 MB back to malloc would let it keep large blocks from then on
        with mmap.mmap(-1, _MORE_THAN_CACHES) as much:
            for page in range(0, len(much), mmap.PAGESIZE):
                much[page] = 0  # until it is written to, every page is one and the same of the system's
            return max(0, _time_cold(hooked.step, much) - _time_cold(bare.step, much))
    finally:
        del hooks._steps[id(hooked)]


#: Bytes that are walked over to make caches cold: a core's own hold 2 MB at most, and the last one is not aimed at.
_MORE_THAN_CACHES = 8 << 20


def _time_cold(call: Callable[[], Any], much: mmap.mmap) -> int:
    times = []
    for _ in range(15):
        much.find(b"\1", 0)  # from the beginning to the end
        start = hooks.clock()
        call()
        times.append(hooks.clock() - start)
    return sorted(times)[len(times) // 2]
