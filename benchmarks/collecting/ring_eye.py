"""Another process that looks at a ring: when could it have shown each step?

    python ring_eye.py RING SECONDS OUT

Looks every so many seconds until its standard input is closed, and then writes OUT, an .npz file: for each step `t`
(monotonic nanoseconds when the look was over that brought it), `usage`, `tokens`, `queries` and `hits` (of the step).
"""

from __future__ import annotations

import select
import sys
import time
from pathlib import Path

import numpy as np

from kvhook.ring.reader import RingReader
from kvhook.ring.slots import fields_of, slot_head
from kvhook.schema import STEP


def main() -> None:
    """Look."""
    ring, seconds, out = Path(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3])
    held, times = [], []
    with RingReader(ring) as reader:
        print("ready", flush=True)
        over = False
        while not over:
            over = bool(select.select([sys.stdin], [], [], seconds)[0])
            if reader.head == reader.cursor:
                continue
            slots = reader.poll().slots
            now = time.monotonic_ns()
            slots = slots[slot_head(slots)["kind"] == STEP]
            held.append(slots)
            times.append(np.full(len(slots), now))
        layout = reader.header.layout
        steps = fields_of(np.concatenate(held), layout.columns["step"])
        np.savez(
            out,
            t=np.concatenate(times),
            usage=steps["kv_cache_usage"],
            tokens=steps["num_generation_tokens"],
            queries=steps["prefix_cache_queries"],
            hits=steps["prefix_cache_hits"],
            lost=reader.lost,
        )


if __name__ == "__main__":
    main()
