"""Which processes come from which, also where one between them does not record: a shell, ``uv run``."""

from __future__ import annotations

from collections.abc import Iterable

from kvhook.ring.place import process_parent, process_start


class Family:
    """Some processes, and all that they have started, directly or not.

    While a process lives, the system says who its parent is. A process whose parent has ended is handed to another one:
    so what was found once is remembered, and what a process wrote down about its parent when it began counts as well.

    Args:
        pids: the processes that all others come from.
    """

    def __init__(self, pids: Iterable[int]) -> None:
        #: process -> when it started, as the number of one that has ended is given to another one some day
        self._known = {pid: process_start(pid) for pid in pids}

    def has(self, process: int, parent: int) -> bool:
        """Whether a process is one of the family.

        Args:
            process: its number.
            parent: who its parent was when it began, as the process itself says.
        """
        return self._comes_from(process, []) or self._comes_from(parent, [process])

    def _comes_from(self, process: int, below: list[int]) -> bool:
        """Go from parent to parent until one is of the family. Then those that led to it are, too."""
        while process > 0 and process not in below:
            if self._knows(process):
                self._known.update((child, process_start(child)) for child in below)
                return True
            below = [*below, process]
            process = process_parent(process)
        return False

    def _knows(self, process: int) -> bool:
        then, now = self._known.get(process, -1), process_start(process)
        return then == now or (then >= 0 and not (then and now))
