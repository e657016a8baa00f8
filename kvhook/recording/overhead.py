"""What a hooked step costs outside the publisher, which cannot measure that part itself."""

from __future__ import annotations

import functools
import mmap
from collections.abc import Callable
from typing import Any

from kvhook import _step
from kvhook.hooks.engines import clock
from kvhook.hooks.registry import registry
from kvhook.hooks.wrappers import around_step


@functools.cache
def call_overhead_ns() -> int:
    """What a step costs on this machine beyond what the publisher can measure from inside, in nanoseconds: the wrapped
    call, and the hand-over of the stats.

    It is measured with cold caches, as they are after a forward pass: 5 to 10 us, against 0.5 us with warm ones. Takes
    some 10 ms, once in a process.
    """
    given: Any = None

    def remember(
        scheduler_stats: Any = None, iteration_stats: Any = None, mm_cache_stats: Any = None, **_: Any
    ) -> None:
        nonlocal given
        given = scheduler_stats, iteration_stats, mm_cache_stats

    # what stands for the functions that take the stats over and publish them is in the language that those are in
    native = _step.native
    record: Callable[..., None] = remember if native is None else native.nothing
    publish: Callable[[int, int], None] = (lambda start, end: None) if native is None else native.nothing

    class Bare:
        def step(self) -> None:
            return None

    class Wrapped:
        def bare_step(self) -> None:
            record(scheduler_stats=None, iteration_stats=None, mm_cache_stats=None)

        step = around_step(bare_step)

    bare, hooked = Bare(), Wrapped()
    registry.steps[id(hooked)] = publish
    try:
        # a separate map, because giving 8 MB back to malloc would make it keep large blocks from then on
        with mmap.mmap(-1, _MORE_THAN_CACHES) as buffer:
            for page in range(0, len(buffer), mmap.PAGESIZE):
                buffer[page] = 0  # a page that was never written to is shared by all, and would stay cached
            return max(0, _time_cold(hooked.step, buffer) - _time_cold(bare.step, buffer))
    finally:
        del registry.steps[id(hooked)]


#: Bytes that are read to make caches cold. A core's own caches hold 2 MB at most; the shared last level is not meant.
_MORE_THAN_CACHES = 8 << 20


def _time_cold(call: Callable[[], Any], buffer: mmap.mmap) -> int:
    times = []
    for _ in range(15):
        buffer.find(b"\1", 0)  # from the beginning to the end
        start = clock()
        call()
        times.append(clock() - start)
    return sorted(times)[len(times) // 2]
