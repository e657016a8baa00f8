"""A thread that looks again and again, as somebody who polls would."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Poller(Generic[T]):
    """Calls `look` every `interval` seconds; what it gave is in `looks`. The first look comes at a random moment of
    the first interval. A look that takes longer than the interval is followed by the next one at once."""

    def __init__(self, look: Callable[[], T], interval: float) -> None:
        self.look = look
        self.interval = interval
        self.looks: list[T] = []
        self._cancelled = threading.Event()
        self._over = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def cancel(self) -> None:
        """End at once."""
        self._cancelled.set()
        self._thread.join()

    def finish(self) -> None:
        """End after one more look, at its time: it is the first that can show the last step."""
        self._over = True
        self._thread.join()

    def _run(self) -> None:
        due = time.monotonic() + random.random() * self.interval
        over = False
        while not over and not self._cancelled.wait(max(0.0, due - time.monotonic())):
            over = self._over
            self.looks.append(self.look())
            due = max(due + self.interval, time.monotonic())
