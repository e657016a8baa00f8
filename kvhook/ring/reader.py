"""Lossy readers of a ring file: they look, and neither the writer nor the file knows."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kvhook.errors import TraceFormatError
from kvhook.ring.layout import (
    CLOSED,
    EVENT_TIME_WORD,
    EVENT_WORD,
    HEAD_WORD,
    MAX_RECORDS,
    REST_TIME_WORD,
    REST_WORD,
    SCHEMA_AT,
    STATE_WORD,
    Header,
)
from kvhook.ring.place import is_alive, open_regular, pid_namespace
from kvhook.ring.slots import CHUNK_BYTES, refute_by_crc, slot_head, whole
from kvhook.ring.trace_file import read_header

if TYPE_CHECKING:
    from kvhook.ring.slots import Bools, Slots


class Batch(NamedTuple):
    """What one `poll` brought: whole slots in order, and how many records were missed among and before them."""

    slots: Slots
    lost: int


def sound(slots: Slots, first: int, *, crc: bool) -> Bools:
    """Which of these slots hold, whole, the records numbered from `first` on."""
    import numpy as np

    good: Bools = whole(slots) & (slot_head(slots)["n"] == np.arange(first, first + len(slots)))
    if crc:
        refute_by_crc(slots, good)
    return good


def writer_alive(header: Header) -> bool:
    """Whether the process that wrote a file still runs. One in another container, of which nothing can be known,
    counts as running."""
    theirs, ours = header.meta.get("pid_namespace"), pid_namespace()
    return bool(theirs and ours and theirs != ours) or is_alive(header.pid, header.process_start)


class RingReader:
    """Reads a ring while it is written, from this or any other process, and after its writer has died.

    Args:
        path: the ring file. Opened read-only; links are not followed.
        start: the first record wanted; what is no longer in the ring then counts as lost. ``None``: the oldest
            record that the ring still holds, nothing counts as lost.

    Raises:
        TraceFormatError: not a ring, damaged, or of a layout this kvhook does not read.
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path, start: int | None = None) -> None:
        import numpy as np

        self.path = path
        fd = open_regular(path, follow_links=False)
        try:
            self.header: Header = read_header(fd, str(path))
            if not self.header.capacity:
                raise TraceFormatError(f"{path} is a trace, not a ring; open it with kvhook.open()")
            self._map = mmap.mmap(fd, os.fstat(fd).st_size, mmap.MAP_SHARED, mmap.PROT_READ)
        finally:
            os.close(fd)
        self._words = memoryview(self._map)[:SCHEMA_AT].cast("Q")
        shape = (self.header.capacity, self.header.layout.slot_bytes)
        self._slots = np.ndarray(shape, np.uint8, buffer=self._map, offset=self.header.header_bytes)
        self.cursor = max(0, self.head - self.header.capacity + 1) if start is None else start
        #: Records missed so far: overwritten before they were read, or damaged.
        self.lost = 0

    @property
    def head(self) -> int:
        """Records published so far."""
        return self._words[HEAD_WORD]

    @property
    def last_event(self) -> tuple[int, int] | None:
        """The code of the kind of what was last done to the engine, and when (monotonic ns); None if nothing was."""
        code = self._words[EVENT_WORD] & 0xFF
        return (code, self._words[EVENT_TIME_WORD]) if code else None

    @property
    def rest(self) -> tuple[int, int] | None:
        """The code of what the engine rests by, and since when (monotonic ns); None if it does not."""
        code = self._words[REST_WORD]
        return (code, self._words[REST_TIME_WORD]) if code else None

    @property
    def closed(self) -> bool:
        """Whether the writer said that it is done. A writer that was killed never says so: see `writer_alive`."""
        return self._words[STATE_WORD] == CLOSED

    @property
    def writer_alive(self) -> bool:
        """Whether the process that made this ring still runs."""
        return writer_alive(self.header)

    def poll(self, most: int = 1 << 30, *, final: bool = False) -> Batch:
        """The records published since the last poll, whole and in order.

        Args:
            most: at most so many records; the rest comes with the next poll.
            final: the writer is known to be dead. Then the slot behind the head is looked at as well: its record
                may be whole with only the head not yet moved.

        Raises:
            TraceFormatError: the ring's head is damaged; `remains` does without it.
        """
        import numpy as np

        capacity = self.header.capacity
        head = self.head
        if head > MAX_RECORDS:
            raise TraceFormatError(f"{self.path}: the count of its records is damaged")
        first = max(self.cursor, head - capacity + 1)
        stop = max(first, min(head, first + most))
        copy = self._copy(first, stop)
        # A record is sound if its stamp says so and the writer cannot have come round to its slot meanwhile.
        good = self._sound(copy, first)
        overwritten = max(0, self.head - capacity + 1 - first)
        good[:overwritten] = False
        if not good.all():
            if not good[overwritten:].all():
                # Where the processor reorders loads a fresh record may look unfinished for a moment: look once more.
                self._look_again(copy, good, first)
            copy = copy[good]
        lost = stop - self.cursor - len(copy)
        self.cursor = stop
        if final and stop == head:
            behind = self._copy(head, head + 1)
            if self._sound(behind, head).all():
                copy = np.concatenate([copy, behind])
                self.cursor = head + 1
        self.lost += lost
        return Batch(copy, lost)

    def put_back(self, batch: Batch, taken: int) -> None:
        """Have the next poll begin behind the first records of the last batch, as long as the ring holds the others.

        Args:
            batch: what the last poll gave, not as the final one.
            taken: so many of its records are not wanted again.
        """
        before = self.cursor - len(batch.slots) - batch.lost
        cursor = int(slot_head(batch.slots)["n"][taken - 1]) + 1 if taken else before
        self.lost -= batch.lost - (cursor - before - taken)
        self.cursor = cursor

    def remains(self) -> Slots:
        """Every whole record of a ring that nobody writes any more, in order: what `poll` would give, found by the
        stamps alone, so that a damaged head does no harm."""
        import numpy as np

        capacity = self.header.capacity
        parts = []
        some = max(1, CHUNK_BYTES // self.header.layout.slot_bytes)
        for at in range(0, capacity, some):
            copy = self._slots[at : at + some].copy()
            good = whole(copy)
            good &= (slot_head(copy)["n"] & (capacity - 1)) == np.arange(at, at + len(copy))
            if self.header.crc:
                refute_by_crc(copy, good)
            parts.append(copy[good])
        slots = np.concatenate(parts)
        n = slot_head(slots)["n"]
        # a slot whose record was damaged cannot show the one before it: that would be a lap older than the rest
        order = n.argsort(kind="stable")
        last: Slots = slots[order[n[order] > n.max(initial=0) - capacity]]
        return last

    def now(self) -> Slots:
        """All that the ring holds at this moment, in order, whatever its writer has come to."""
        if not self.writer_alive:
            return self.remains()
        self.cursor = max(0, self.head - self.header.capacity + 1)
        return self.poll().slots

    def close(self) -> None:
        """Let go of the file. Arrays from earlier polls stay valid: they are copies. Closing twice is fine."""
        if hasattr(self, "_slots"):
            self._words.release()
            del self._slots
            self._map.close()

    def __enter__(self) -> RingReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _copy(self, first: int, stop: int) -> Slots:
        import numpy as np

        capacity = self.header.capacity
        a = first & (capacity - 1)
        b = a + stop - first
        if b <= capacity:
            return self._slots[a:b].copy()
        return np.concatenate([self._slots[a:], self._slots[: b - capacity]])

    def _sound(self, slots: Slots, first: int) -> Bools:
        return sound(slots, first, crc=self.header.crc)

    def _look_again(self, copy: Slots, good: Bools, first: int) -> None:
        again = self._copy(first, first + len(copy))
        now = self._sound(again, first)
        now[: max(0, self.head - self.header.capacity + 1 - first)] = False
        new = now & ~good
        copy[new] = again[new]
        good |= new
