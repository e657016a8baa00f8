"""The torn-read harness: a writer in one process, a hostile reader in another, and writers that are broken on purpose.

Each record tells by itself whether it is whole: every field of record n is computed from n.

Two eyes look, because the protocol has two lines of defence:

``poll``    `RingReader.poll` itself, over a ring of 8 slots, so that every record it takes is next to the one that is
            being written. It trusts the head first: what the writer may have come round to is not believed.
``stamps``  aims at the very slot that is being written and believes its stamps alone, one before the copy and one
            after. This is what is left after a crash, when the head says nothing about the slot behind it.

The writers that are broken show that the eyes see: ``late_stamp`` stores the body before the odd stamp,
``pack_into`` packs straight into shared memory, ``careless`` does the former and lets the head lag behind as well.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kvhook.ring.layout import BODY_AT, FIELDS_AT, HEAD_WORD, make_layout
from kvhook.ring.reader import RingReader
from kvhook.ring.writer import RingWriter
from kvhook.schema import STEP, Field

#: Slots of 4 KiB, ten times as long as a real one: so much longer does a store take, in which a reader may come.
INTEGERS, FLOATS = 496, 12
LAYOUT = make_layout(
    {
        "step": tuple(Field(f"i{k}", "i8", "id", "", "") for k in range(INTEGERS))
        + tuple(Field(f"f{k}", "f8", "id", "", "") for k in range(FLOATS))
    }
)
CAPACITY = 8
FIELDS = INTEGERS + FLOATS
#: The fields of records n and n + PERIOD are the same: so they can be packed beforehand, and the writer only writes.
PERIOD = 1024

Write = Callable[[RingWriter, int], None]
Eye = Callable[[RingReader, int], "Seen"]


class Seen(NamedTuple):
    """How many records were read, how many of them accepted, and how many of those were torn."""

    reads: int
    accepted: int
    torn: int


_HEAD = struct.Struct("<qii")
_FIELDS = struct.Struct(f"<{INTEGERS}q{FLOATS}d")


def _values(n: int) -> tuple[float, ...]:
    first = n % PERIOD
    return (*range(first, first + INTEGERS), *map(float, range(first + INTEGERS, first + FIELDS)))


_REST = [_FIELDS.pack(*_values(n)).ljust(LAYOUT.slot_bytes - FIELDS_AT, b"\0") for n in range(PERIOD)]


def body(n: int) -> bytes:
    """Record n: field k is n % PERIOD + k."""
    return _HEAD.pack(n, STEP, 0) + _REST[n % PERIOD]


def count_torn(slots: np.ndarray) -> int:
    """How many of these slots hold something else than one whole record, the one that their stamp names."""
    words = np.ascontiguousarray(slots).view("<i8")
    n = words[:, BODY_AT // 8]
    fields = words[:, FIELDS_AT // 8 :]
    first = (n % PERIOD)[:, None]
    bad = (fields[:, :INTEGERS] != first + np.arange(INTEGERS)).any(axis=1)
    floats = np.ascontiguousarray(fields[:, INTEGERS:FIELDS]).view("<f8")
    bad |= (floats != first + np.arange(INTEGERS, FIELDS)).any(axis=1)
    bad |= words[:, 0] != 2 * n + 2
    return int(bad.sum())


# ---- writers -------------------------------------------------------------------------------------------------------


def good(ring: RingWriter, n: int) -> None:
    """`RingWriter.publish` as it is."""
    ring.publish(n, body(n))


def late_stamp(ring: RingWriter, n: int) -> None:
    """The body first, and only then the stamp that says it is being written."""
    at = ring.header_bytes + (n & CAPACITY - 1) * LAYOUT.slot_bytes
    ring.map[at + BODY_AT : at + LAYOUT.slot_bytes] = body(n)
    ring.words[at >> 3] = 2 * n + 1
    ring.words[at >> 3] = 2 * n + 2
    ring.words[HEAD_WORD] = n + 1


_NUMBER = struct.Struct("<q")
_WHOLE = struct.Struct(f"<QQqii{INTEGERS}q{FLOATS}d")


def pack_into(ring: RingWriter, n: int) -> None:
    """The whole slot, stamp and all, packed straight into shared memory."""
    at = ring.header_bytes + (n & CAPACITY - 1) * LAYOUT.slot_bytes
    _WHOLE.pack_into(ring.map, at, 2 * n + 2, 0, n, STEP, 0, *_values(n))
    ring.words[HEAD_WORD] = n + 1


def careless(ring: RingWriter, n: int) -> None:
    """Late stamps, and a head that moves only with every fourth record: a reader believes what is being overwritten."""
    at = ring.header_bytes + (n & CAPACITY - 1) * LAYOUT.slot_bytes
    ring.map[at + BODY_AT : at + LAYOUT.slot_bytes] = body(n)
    ring.words[at >> 3] = 2 * n + 1
    ring.words[at >> 3] = 2 * n + 2
    if n % 4 == 3:
        ring.words[HEAD_WORD] = n + 1


WRITERS: dict[str, Write] = {f.__name__: f for f in (good, late_stamp, pack_into, careless)}


# ---- eyes ----------------------------------------------------------------------------------------------------------


def poll(reader: RingReader, polls: int) -> Seen:
    """All the ring holds, again and again."""
    reads = accepted = torn = 0
    for _ in range(polls):
        reader.cursor = max(0, reader.head - CAPACITY + 1)
        before = reader.cursor
        slots = reader.poll().slots
        reads += reader.cursor - before
        accepted += len(slots)
        torn += count_torn(slots) if len(slots) else 0
    return Seen(reads, accepted, torn)


def stamps(reader: RingReader, reads: int) -> Seen:
    """The slot that is being written, or is the next to be: accepted if its stamp is even, and the same afterwards."""
    memory, words = reader._map, reader._words
    slots = memoryview(memory).cast("Q")
    first, size, mask = reader.header.header_bytes, LAYOUT.slot_bytes, CAPACITY - 1
    kept = []
    for i in range(reads):
        at = first + ((words[HEAD_WORD] + (i & 1)) & mask) * size
        stamp = slots[at >> 3]
        copy = memory[at : at + size]
        if slots[at >> 3] == stamp and not stamp & 1 and _NUMBER.unpack_from(copy, BODY_AT)[0] == (stamp >> 1) - 1:
            kept.append(copy)
    slots.release()
    accepted = len(kept)
    torn = count_torn(np.frombuffer(b"".join(kept), np.uint8).reshape(-1, size)) if kept else 0
    return Seen(reads, accepted, torn)


EYES: dict[str, Eye] = {"poll": poll, "stamps": stamps}


# ---- the run -------------------------------------------------------------------------------------------------------


def run(directory: Path, writer: str, eye: str, reads: int, *, crc: bool = False, seconds: float = 600.0) -> Seen:
    """Let a writer process write at full speed, and read at least `reads` times, but not longer than `seconds`.

    With a broken writer, stop at the first torn record: it has been seen.
    """
    path = directory / f"{writer}-{eye}-{os.urandom(4).hex()}.ring"
    go = mmap.mmap(-1, mmap.PAGESIZE)
    child = os.fork()
    if not child:
        _write_for_ever(path, WRITERS[writer], go, crc)
    total = Seen(0, 0, 0)
    try:
        while not go[0]:
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "the writer could not start"
            time.sleep(0.001)
        until = time.monotonic() + seconds
        with RingReader(path, 0) as reader:
            while (total.reads < reads or total.accepted <= 1000) and time.monotonic() < until:
                seen = EYES[eye](reader, 2000)
                total = Seen(*(a + b for a, b in zip(total, seen, strict=True)))
                if writer != "good" and total.torn:
                    break
    finally:
        end(child)
        path.unlink(missing_ok=True)
    return total


def end(child: int) -> None:
    """Kill a child, and wait until it is gone; fine if it is already."""
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _write_for_ever(path: Path, write: Write, go: mmap.mmap, crc: bool) -> None:
    try:
        ring = RingWriter(path, LAYOUT, CAPACITY, {"kvhook": "test", "engine": 0}, crc=crc)
        n = 0
        while True:
            write(ring, n)
            n += 1
            if n == 4 * CAPACITY:
                go[0] = 1
    finally:
        os._exit(1)
