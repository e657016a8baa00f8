"""The one writer of a ring file."""

from __future__ import annotations

import mmap
import os
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvhook import _step, forks
from kvhook.ring.layout import (
    BODY_AT,
    CLOSED,
    EVENT_TIME_WORD,
    EVENT_WORD,
    HEAD_WORD,
    MAX_CAPACITY,
    REST_TIME_WORD,
    REST_WORD,
    STATE_WORD,
    Layout,
    pack_header,
)
from kvhook.ring.place import create_file, process_start

#: ``publish(n, record)`` stores record number n, packed by `Layout.struct_of`, and gives the next number, n + 1.
Publish = Callable[[int, bytes], int]


#: `kvhook.forks.generation`, copied here because a global of this module is read faster in every step. A ring is
#: written by the process that made it: in a forked child, which shares the map, its writer does nothing.
_generation = forks.generation


class RingWriter:
    """Makes a ring file and publishes records into it, overwriting the oldest.

    One thread writes. Readers in any process need nothing from the writer and cannot slow it down.

    Args:
        path: the new file; must not exist.
        layout: what a slot holds.
        capacity: slots, a power of two.
        meta: JSON-able facts for the header; ``meta["kvhook"]`` is the version that writes.
        crc: store a crc32 with each record; needed where the processor reorders stores (ARM64).

    Raises:
        OSError: the file cannot be made or its space not allocated.
        ValueError: capacity is not a power of two, or meta is too large for a header.
    """

    def __init__(self, path: Path, layout: Layout, capacity: int, meta: dict[str, Any], *, crc: bool = False) -> None:
        if capacity < 2 or capacity & (capacity - 1) or capacity > MAX_CAPACITY:
            raise ValueError(f"a ring holds a power of two of slots, from 2 to {MAX_CAPACITY}; not {capacity}")
        self.path = path
        self.layout = layout
        self.capacity = capacity
        self.crc = crc
        header = pack_header(
            layout,
            meta,
            capacity=capacity,
            pid=os.getpid(),
            process_start=process_start(os.getpid()),
            clocks=(time.monotonic_ns(), time.time_ns()),
            crc=crc,
        )
        self.header_bytes = len(header)
        size = len(header) + capacity * layout.slot_bytes
        fd = create_file(path, size)
        try:
            # MAP_POPULATE: the first touch of a page costs 1.3 us, and belongs here rather than into a step
            flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
            self.map = mmap.mmap(fd, size, flags, mmap.PROT_READ | mmap.PROT_WRITE)
        finally:
            os.close(fd)
        self.words = memoryview(self.map).cast("Q")
        self.map[8 : len(header)] = header[8:]
        self.map[:8] = header[:8]
        self._generation = _generation
        self.publish: Publish = self._make_publish()
        self.closed = False

    @property
    def head(self) -> int:
        """Records published so far."""
        return self._last_head if self.closed else self.words[HEAD_WORD]

    def note_event(self, code: int, rest: bool | None = None) -> None:
        """Something was done to the engine, see `kvhook.records.engine_events`: readers see the last such event. Any
        thread may call it.

        Args:
            code: of its kind, from 1 to 255.
            rest: whether the engine rests from now on; None if that does not change.
        """
        if not self.closed and self._generation == _generation:
            words = self.words
            words[EVENT_TIME_WORD] = now = time.monotonic_ns()
            if rest is not None:
                words[REST_TIME_WORD] = now
                words[REST_WORD] = code if rest else 0
            words[EVENT_WORD] = (words[EVENT_WORD] >> 8) + 1 << 8 | code

    def close(self) -> None:
        """Mark the ring closed. The file stays: its records can still be read. Closing twice is fine.

        The map itself goes when the last one who holds `publish` lets go of it: a step that is under way in another
        thread at this moment ends well.
        """
        if not self.closed:
            self._last_head = self.head
            self.closed = True
            if self._generation == _generation:
                self.words[STATE_WORD] = CLOSED
            del self.publish, self.words, self.map

    def _make_publish(self) -> Publish:
        if _step.native is not None:
            store: Publish = _step.native.RingStore(
                self.map, self.header_bytes, self.layout.slot_bytes, self.capacity, self.crc
            )
            return store
        memory, words, mask, slot = self.map, self.words, self.capacity - 1, self.layout.slot_bytes
        first, body_at, body, head_word = self.header_bytes, BODY_AT, slot - BODY_AT, HEAD_WORD
        crc, crc32, generation = self.crc, zlib.crc32, self._generation

        # The order of these stores is the protocol; ring/layout.py says why each is as it is. The caller counts, in
        # one place: a Ctrl-C in here then costs one record, and never leaves two counters that disagree.
        def publish(n: int, record: bytes) -> int:
            if generation != _generation:
                return n + 1  # a forked child: the ring is its parent's
            at = first + (n & mask) * slot
            word = at >> 3
            words[word] = n + n + 1
            if crc:
                words[word + 1] = crc32(record)
            at += body_at
            memory[at : at + body] = record
            words[word] = n + n + 2
            n += 1
            words[head_word] = n
            return n

        return publish


def _in_child() -> None:
    global _generation
    _generation = forks.generation


forks.call_in_child(_in_child)
