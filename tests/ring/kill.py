"""The kill harness: a process that publishes at full speed is killed at a random moment; what is left is compared with
what it had reported as published."""

from __future__ import annotations

import mmap
import os
import random
import struct
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kvhook.ring.reader import RingReader
from kvhook.ring.slots import slot_head
from kvhook.ring.writer import RingWriter
from tests.ring.torn import LAYOUT, body, count_torn, end

CAPACITY = 256
_WORD = struct.Struct("<q")


class Left(NamedTuple):
    """What was found after one kill."""

    #: records whose publish had returned
    published: int
    #: of those, how many the ring can still hold, and how many of them are not there or not right
    expected: int
    missing: int
    torn: int
    #: records beyond the published ones: there is at most one, whose publish had not returned yet
    more: int
    #: whether the head had not moved any more when the record was whole
    behind_head: bool


def kill_once(directory: Path, chance: random.Random, longest: float = 0.02) -> Left:
    """One process, one kill, one look at what is left."""
    path = directory / f"{chance.getrandbits(64):x}.ring"
    progress = mmap.mmap(-1, mmap.PAGESIZE)
    words = memoryview(progress).cast("q")
    child = os.fork()
    if not child:
        _publish_for_ever(path, words)
    try:
        while not words[0]:
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "the writer could not start"
            time.sleep(0.0002)
        time.sleep(chance.random() * longest)
    finally:
        end(child)
    published = words[0]
    words.release()
    progress.close()
    with RingReader(path) as reader:
        head = reader.head
        polled = reader.poll(final=True).slots
        slots = reader.remains()
    path.unlink()
    numbers = slot_head(slots)["n"]
    # one more may have been published without being reported, and the next one begun over the oldest
    expected = np.arange(max(0, published - CAPACITY + 2), published)
    missing = len(np.setdiff1d(expected, numbers)) + len(np.setdiff1d(expected, slot_head(polled)["n"]))
    return Left(
        published=published,
        expected=len(expected),
        missing=missing,
        torn=count_torn(slots) + count_torn(polled),
        more=int((numbers >= published).sum()),
        behind_head=bool((numbers >= head).any()),
    )


def _publish_for_ever(path: Path, words: memoryview) -> None:
    try:
        ring = RingWriter(path, LAYOUT, CAPACITY, {"kvhook": "test", "engine": 0})
        publish = ring.publish
        n = 0
        while True:
            n = publish(n, body(n))
            words[0] = n
    finally:
        os._exit(1)
