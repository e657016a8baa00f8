"""Traces like those that the Mooncake project has published, made from the statistics in its paper.

The traces themselves are in no package. These have as many requests, prompts and answers as long on average, and share
as much: "Mooncake: Trading More Storage for Less Computation", FAST '25, the table of its three workloads. The requests
are made up; only these figures are theirs.

    python -m tests.whatif.mooncake_like tool_and_agent > requests.jsonl
"""

from __future__ import annotations

import json
import random
import sys
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

BLOCK_SIZE = 512


class Workload(NamedTuple):
    """What the paper says of one workload."""

    requests: int
    input_length: int
    output_length: int
    #: share of the prompts' blocks that an endless cache finds
    found: float


WORKLOADS = {
    "conversation": Workload(12_031, 12_035, 343, 0.40),
    "tool_and_agent": Workload(23_608, 8_596, 182, 0.59),
    "synthetic": Workload(3_993, 15_325, 149, 0.66),
}
#: The requests that a new one may go on from.
RECENT = 400
#: Milliseconds that a trace takes: an hour.
DURATION = 3_600_000


def rows(name: str, seed: int = 0) -> Iterator[dict[str, Any]]:
    """The lines of a trace, in order.

    Whenever less has been found so far than the paper says, a request goes on from a recent one, as far as that is
    as long as itself; else nothing of it was there before.
    """
    workload, rng = WORKLOADS[name], random.Random(seed)
    recent: deque[list[int]] = deque(maxlen=RECENT)
    blocks = found = following = 0
    for number in range(workload.requests):
        length = 1 + int(rng.gammavariate(1.5, (workload.input_length - 1) / 1.5))
        count = -(-length // BLOCK_SIZE)
        shared: list[int] = []
        if recent and found < workload.found * blocks:
            shared = max(rng.choices(recent, k=4), key=lambda chain: min(len(chain), count))[: length // BLOCK_SIZE]
        chain = shared + list(range(following, following + count - len(shared)))
        following += count - len(shared)
        blocks, found = blocks + count, found + len(shared)
        recent.append(chain)
        yield {
            "timestamp": number * DURATION // workload.requests,
            "input_length": length,
            "output_length": 1 + int(rng.expovariate(1 / (workload.output_length - 1))),
            "hash_ids": chain,
        }


def main() -> None:
    """Print a trace."""
    for row in rows(sys.argv[1]):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
