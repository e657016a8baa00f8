"""The scheduler, where it is in this process: how many KV blocks are free when a step has been scheduled.

vLLM reports usage at the end of a step, after finished requests gave their blocks back. A batch that ends together
shows no usage at all then. Right after ``schedule()`` every block of the step is still in use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvhook.adapters.table import Adapter, read_path
from kvhook.faults import USERS

#: More than any engine has.
_MOST_BLOCKS = 1 << 40


class FreeBlocks:
    """Reads the number of free blocks after each ``schedule()`` of an engine's scheduler.

    Raises:
        LookupError: the scheduler is not in this process, or its free blocks cannot be read.
    """

    def __init__(
        self,
        engine: Any,
        adapter: Adapter,
        failed: Callable[[BaseException], None],
        is_off: Callable[[], bool] = lambda: False,
    ) -> None:
        found = read_path(engine, adapter.schedulers) if adapter.schedulers else None
        schedulers = list(found) if isinstance(found, (list, tuple)) else [found]
        if len(schedulers) != 1 or schedulers[0] is None or not hasattr(schedulers[0], "schedule"):
            raise LookupError("no scheduler, or several of them, in this process")
        self.scheduler = schedulers[0]
        self._count, self._failed = _free_blocks(self.scheduler, adapter), failed
        self._is_off = is_off
        self._broken = False
        self._fewest = -1

    def take(self) -> int:
        """The fewest free blocks since the last call, -1 if nothing was scheduled."""
        fewest, self._fewest = self._fewest, -1
        return fewest

    def method(self) -> tuple[Any, str, Callable[..., Any]]:
        """What is to be put into the scheduler: object, name, function."""
        schedule, count = self.scheduler.schedule, self._count

        def schedule_and_count_blocks(*args: Any, **kwargs: Any) -> Any:
            scheduled = schedule(*args, **kwargs)
            if self._broken and self._is_off():
                return scheduled
            try:
                free = count()
                if type(free) is not int or not 0 <= free <= _MOST_BLOCKS:
                    raise TypeError(f"{type(free).__name__} instead of a number of blocks")
                # with asynchronous scheduling, two schedules may come before one output
                self._fewest = free if self._fewest < 0 else min(self._fewest, free)
            except USERS:
                raise
            except BaseException as error:
                self._broken = True
                self._failed(error)
            return scheduled

        return self.scheduler, "schedule", schedule_and_count_blocks


def _free_blocks(scheduler: Any, adapter: Adapter) -> Callable[[], int]:
    """What returns a scheduler's number of free blocks."""
    for path in adapter.free_blocks:
        owner, _, name = path.rpartition(".")
        holder = read_path(scheduler, owner)
        try:
            there = getattr(holder, name)
            if callable(there) and type(there()) is int:
                method: Callable[[], int] = there
                return method
            if type(there) is int:
                return lambda holder=holder, name=name: int(getattr(holder, name))  # type: ignore[misc]
        except Exception:  # this release has it elsewhere: the next path may be right
            continue
    raise LookupError(f"the scheduler has none of {', '.join(adapter.free_blocks) or 'the block pools known'}")
