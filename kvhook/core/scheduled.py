"""A step of the engine core between its ``schedule`` and its ``update_from_output``."""

from __future__ import annotations

from typing import Any, NamedTuple

from kvhook.core.lives import Life


class Scheduled(NamedTuple):
    """A step that has been scheduled and has not ended yet."""

    output: Any
    step: int
    t_schedule: int
    t_scheduled: int
    #: the columns that were known when it had been scheduled, from num_scheduled_tokens to num_waiting...
    batch: tuple[int, ...]
    states: tuple[int, ...]
    #: requests whose prefill ended in it
    begun: list[Life]
    own_ns: int
