"""Where slots come from: a trace file, the memory of a ring, or a part of another source."""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvhook.errors import KvhookError, TraceFormatError
from kvhook.ring.frames import Frame, frames_of, read_frame
from kvhook.ring.layout import Header, Kinds, Layout
from kvhook.ring.place import open_regular
from kvhook.ring.slots import CHUNK_BYTES, slot_head, whole
from kvhook.ring.trace_file import read_header
from kvhook.schema import KINDS, META, REQUEST

if TYPE_CHECKING:
    from kvhook.ring.slots import Bools, Slots

#: A process numbers its engines from 0: a record of an engine beyond this is damaged.
MAX_ENGINES = 1 << 16


def usable(slots: Slots, kinds: Kinds = KINDS) -> Bools:
    """Which slots hold a whole record of a kind and an engine that there can be."""
    head = slot_head(slots)
    codes = [code for code, _ in kinds.values()]
    good: Bools = whole(slots)
    kind, engine = head["kind"], head["engine"]
    known = kind == codes[0]
    for code in codes[1:]:
        known |= kind == code
    good &= known & (engine >= 0) & (engine < MAX_ENGINES)
    return good


class SlotSource:
    """Slots of one layout, in order.

    Attributes:
        layout: of every slot.
        header: of the file or ring that they are from; None if they are from none.
        engines: engine -> facts that are known before a slot has been read.
    """

    def __init__(self, layout: Layout, header: Header | None = None, engines: dict[int, dict[str, Any]] | None = None):
        self.layout = layout
        self.header = header
        self.engines = engines or {}

    @property
    def in_holes(self) -> int:
        """Slots that `chunks` leaves out because nothing was ever written there."""
        return 0

    def chunks(self) -> Iterator[Slots]:
        """The slots, some thousands at a time, usable or not."""
        raise NotImplementedError


class FileSlots(SlotSource):
    """A ``.kvh`` file, compressed or not. It is held open, so that it can be read even after it was dropped from a
    bounded history.

    Args:
        path: the file.
        fd: a descriptor of it, which is taken over; for a file that may have lost its name.

    Raises:
        TraceFormatError: it is a ring, or damaged.
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path, fd: int | None = None) -> None:
        self._fd = open_regular(path) if fd is None else fd
        # a descriptor rather than a file object: that would complain that it is closed by nobody but the collector
        close = weakref.finalize(self, os.close, self._fd)
        try:
            self._header = read_header(self._fd, str(path))
            if self._header.capacity:
                raise TraceFormatError(f"{path} is a ring, not a trace")
            self._path, self._frames, self._count = path, list[Frame](), 0
            super().__init__(self._header.layout, self._header)
            self.refresh()
        except KvhookError:
            close()
            raise

    def refresh(self) -> None:
        """Take in what has been appended to the file since."""
        size = os.fstat(self._fd).st_size
        if self._header.compressed:
            self._frames = frames_of(self._fd, self._header.header_bytes, size, str(self._path))
            self._count = sum(frame.slots for frame in self._frames)
            return
        self._count = (size - self._header.header_bytes) // self.layout.slot_bytes

    def chunks(self, first: int = 0, nbytes: int = CHUNK_BYTES) -> Iterator[Slots]:
        """The file's slots from the so-manieth on, so many bytes at a time. A last one that was cut off is left out.
        So are those that lie in a hole of the file: see `in_holes`."""
        slot = self.layout.slot_bytes
        if self._header.compressed:
            yield from self._decompressed(first)
            return
        at_a_time = max(1, nbytes // slot)
        for begin, end in self._written(first):
            for at in range(begin, end, at_a_time):
                count = min(at_a_time, end - at)
                data = os.pread(self._fd, count * slot, self._header.header_bytes + at * slot)
                yield np.frombuffer(data[: len(data) // slot * slot], np.uint8).reshape(-1, slot)

    @property
    def in_holes(self) -> int:
        """Slots that were never written: a file can be made as long as one likes without taking any place."""
        return 0 if self._header.compressed else self._count - sum(end - begin for begin, end in self._written(0))

    def _written(self, first: int) -> Iterator[tuple[int, int]]:
        """From which slot to which something has been written, as far as the file system can tell."""
        slot, before = self.layout.slot_bytes, self._header.header_bytes
        while first < self._count:
            try:
                begin = os.lseek(self._fd, before + first * slot, os.SEEK_DATA)
                hole = os.lseek(self._fd, begin, os.SEEK_HOLE)
            except OSError as error:
                if error.errno != errno.ENXIO:  # it knows no holes
                    yield first, self._count
                return  # nothing but a hole follows
            end = min(self._count, -(-(hole - before) // slot))
            first = max(first, (begin - before) // slot)
            if first < end:
                yield first, end
            first = max(first, end)

    def _decompressed(self, first: int) -> Iterator[Slots]:
        for frame in self._frames:
            if first < frame.slots:
                yield read_frame(self._fd, frame, self.layout.slot_bytes, str(self._path))[first:]
            first = max(0, first - frame.slots)


class ArraySlots(SlotSource):
    """Slots in memory: what a ring holds. Their one engine's facts are in the ring's header."""

    def __init__(self, slots: Slots, header: Header) -> None:
        super().__init__(header.layout, header, {int(header.meta.get("engine", 0)): header.meta})
        self._slots = slots

    def chunks(self) -> Iterator[Slots]:
        """All of them at once."""
        yield self._slots


class RenumberedSlots(SlotSource):
    """A source of one run among the sources of others: its engines get other numbers, and its facts are left out.

    Args:
        source: the source.
        first_engine: what is added to the numbers of its engines.
        codes: column of `kvhook.schema.NAMES` -> what is added to its codes.
    """

    def __init__(self, source: SlotSource, first_engine: int, codes: Mapping[str, int]) -> None:
        super().__init__(source.layout, source.header)
        self._source = source
        self._first_engine, self._codes = first_engine, codes

    def chunks(self) -> Iterator[Slots]:
        """Copies of the usable slots, with the new numbers."""
        for slots in self._source.chunks():
            slots = slots[usable(slots)]
            slots = slots[slot_head(slots)["kind"] != META].copy()  # the facts have been read already
            head = slot_head(slots)
            head["engine"] += self._first_engine
            requests = head["kind"] == REQUEST
            for column in self.layout.columns["request"] if requests.any() else ():
                if self._codes.get(column.name):
                    codes = slots[:, column.offset : column.offset + 8].view("<i8")[:, 0]
                    codes[requests & (codes >= 0)] += self._codes[column.name]
            yield slots


class LaterSlots(SlotSource):
    """A source without each engine's records up to a certain one. Facts stay.

    Args:
        source: the whole of it.
        after: engine -> the last record that is left out.
    """

    def __init__(self, source: SlotSource, after: Mapping[int, int]) -> None:
        super().__init__(source.layout, source.header, source.engines)
        self._source = source
        self._after = after

    def chunks(self) -> Iterator[Slots]:
        """The later slots."""
        for slots in self._source.chunks():
            head = slot_head(slots)
            last = np.full(len(slots), -1, np.int64)
            for engine, n in self._after.items():
                last[head["engine"] == engine] = n
            yield slots[(head["n"] > last) | (head["kind"] == META)]
