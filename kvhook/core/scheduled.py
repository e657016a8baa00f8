"""A step of the engine core between its ``schedule`` and its ``update_from_output``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from kvhook.core.lives import Life


def new_holders(new_blocks: Iterable[tuple[str, Any]], lives: Mapping[str, Life]) -> dict[int, int]:
    """Block number -> number of the request that got it in a step.

    Args:
        new_blocks: request id and, for each KV group, block numbers; or None.
        lives: the requests.
    """
    holders: dict[int, int] = {}
    for request_id, blocks in new_blocks:
        life = lives.get(request_id)
        if blocks and life is not None:
            for group in blocks:
                holders.update(dict.fromkeys(group, life.number))
    return holders


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
    #: what `CoreState.take` gave then; its own update adds to it
    counts: tuple[int, ...]
