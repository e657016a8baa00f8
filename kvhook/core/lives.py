"""Requests in the engine core, from their arrival to their end."""

from __future__ import annotations

import hashlib
import re
from typing import Any, NamedTuple

#: vLLM's ids inside the core: the user's, from 0.14 on with eight random digits behind it, and for one of n samples of
#: a prompt with the sample's number in front of it.
_ID = re.compile(r"(?:(\d+)_)?(.*?)(?:-[0-9a-f]{8})?", re.DOTALL)


class Miss(NamedTuple):
    """Why a look-up found no more: the last columns of `kvhook.core_schema.LOOKUP_FIELDS`."""

    #: an index into MISS_REASONS
    reason: int = 0
    block: int = -1
    steps: int = -1
    age: int = -1
    by: int = -1
    evicted_tokens: int = 0


class Life:
    """One request, as far as it has come. Times are monotonic nanoseconds, -1 where something has not happened."""

    __slots__ = (
        "arrived_step",
        "cached",
        "first_scheduled_step",
        "first_token_step",
        "found",
        "high",
        "looked_up",
        "miss",
        "number",
        "preempted_at",
        "preempted_ns",
        "preemptions",
        "prefilled",
        "reached",
        "recomputed",
        "request",
        "shared",
        "t_arrived",
        "t_first_scheduled",
        "t_first_token",
        "t_looked_up",
        "tries",
    )

    def __init__(self, number: int, request: Any, step: int, now: int) -> None:
        self.number, self.request = number, request
        self.arrived_step, self.t_arrived = step, now
        self.first_scheduled_step = self.first_token_step = -1
        self.t_first_scheduled = self.t_first_token = -1
        #: tokens it had not to compute when it was first scheduled, those computed, and those computed again
        self.cached = -1
        self.prefilled = self.recomputed = 0
        #: how many tokens had been computed when it was preempted: what lies below is computed again
        self.high = 0
        #: how far its prefill has come
        self.reached = 0
        self.preemptions = self.preempted_ns = 0
        self.preempted_at = -1
        #: the last look-up: how often, when, of how many tokens, how many were found, and why not more
        self.tries = 0
        self.t_looked_up = -1
        self.looked_up = self.found = 0
        #: tokens of its beginning that prompts before it had as well; -1 while that has not been looked for
        self.shared = -1
        self.miss: Miss = NO_MISS


NO_MISS = Miss()


def read_id(request_id: str) -> tuple[str, int]:
    """The user's request id in one of the core's, and the sample's number, -1 for a request of its own."""
    match = _ID.fullmatch(request_id)
    assert match is not None  # the pattern fits every text
    sample, name = match.groups()
    return name, int(sample) if sample else -1


def request_key(key: bytes, request_id: str) -> int:
    """A digest of a request id that fits into a column; without the run's key it tells nothing."""
    digest = hashlib.blake2b(request_id.encode("utf-8", "surrogatepass"), digest_size=8, key=key).digest()
    return int.from_bytes(digest, "little") >> 1
