"""What the tests of a budget share: the length of a step, and something that is asked to step down."""

from __future__ import annotations

from collections.abc import Callable

from kvhook.adapters.step_functions import Counters
from kvhook.recording.budget import Level

#: Nanoseconds of a step in these tests.
STEP_NS = 1_000_000


class Down:
    """Takes the place of what changes an engine over: remembers what it was asked for."""

    def __init__(self, answers: Callable[[Level], bool] = lambda _: True) -> None:
        self.answers = answers
        self.asked: list[Level] = []
        self.counters: list[Counters] = []
        self.shares: list[float] = []

    def __call__(self, level: Level, counters: Counters, share: float) -> bool:
        self.asked.append(level)
        self.counters.append(counters)
        self.shares.append(share)
        return self.answers(level)
