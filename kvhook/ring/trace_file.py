"""The files: reading the header of a ring or a trace, and writing a ``.kvh`` trace (the ring's own header, then slots
in order, without end)."""

from __future__ import annotations

import errno
import json
import os
import struct
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvhook.ring.layout import (
    CLOSED,
    COMPRESSED,
    HEAD_WORD,
    MAX_HEADER,
    STATE_WORD,
    VERSION,
    Header,
    Layout,
    pack_header,
    parse_header,
)
from kvhook.ring.place import create_file, open_regular, process_start
from kvhook.schema import META

if TYPE_CHECKING:
    from kvhook.ring.slots import Slots

TRACE_SUFFIX = ".kvh"

_WORD = struct.Struct("<Q")


def read_header(fd: int, name: str) -> Header:
    """Read and check the header of an open ring or trace. The file's position does not matter and does not change.

    Args:
        fd: the file.
        name: what to call it in errors.

    Raises:
        TraceFormatError: it is neither a ring nor a trace, or its header is damaged.
        OSError: it cannot be read.
    """
    return parse_header(os.pread(fd, MAX_HEADER, 0), os.fstat(fd).st_size, name)


def header_of(path: Path, *, follow_links: bool = True) -> Header:
    """The same for a file by its name.

    Args:
        path: the file.
        follow_links: False for a name that others can guess: then a symbolic link is refused.

    Raises:
        TraceFormatError: it is neither a ring nor a trace, or its header is damaged.
        OSError: it cannot be opened or read.
    """
    fd = open_regular(path, follow_links=follow_links)
    try:
        return read_header(fd, str(path))
    finally:
        os.close(fd)


class TraceWriter:
    """Appends slots to a new ``.kvh`` file: the ring's own header, then slots in order, without end.

    Raises:
        OSError: the file exists or cannot be made.
    """

    def __init__(self, path: Path, layout: Layout, meta: dict[str, Any]) -> None:
        self.path = path
        self.layout = layout
        header = trace_header(layout, meta)
        self._fd = create_file(path)
        try:
            _write(self._fd, memoryview(header), 0)
        except OSError:
            os.close(self._fd)
            path.unlink(missing_ok=True)
            raise
        self.header_bytes = self.size = len(header)
        #: an engine whose records are in here: what is written about the whole run is written as being about it
        self.engine = 0

    @property
    def slots(self) -> int:
        """Slots in the file."""
        return (self.size - self.header_bytes) // self.layout.slot_bytes

    def append(self, slots: Slots) -> None:
        """Append raw slots.

        Raises:
            OSError: not all were written; `slots` counts those that are in the file, and it ends with a whole one. The
                same goes for whatever else is raised on the way.
        """
        if not os.fstat(self._fd).st_nlink:
            raise FileNotFoundError(errno.ENOENT, "the file or its directory has been removed", str(self.path))
        data = slots.ravel().data  # a view where the slots are contiguous, as they come from the ring
        before = self.size
        try:
            _write(self._fd, data, before)
            self.size = before + len(data)
        except BaseException:
            there = os.fstat(self._fd).st_size
            self.size = max(before, there - (there - self.header_bytes) % self.layout.slot_bytes)
            raise

    def append_meta(self, engine: int, meta: dict[str, Any]) -> None:
        """Append a piece of metadata about an engine; what comes later in the file counts."""
        self.append(pack_meta(self.layout, engine, meta))

    def descriptor(self) -> int:
        """A descriptor of its own for somebody who wants to read the file, which may have lost its name.

        Raises:
            OSError: it is closed, and no longer there.
        """
        return os.dup(self._fd) if self._fd >= 0 else open_regular(self.path)

    def close(self) -> None:
        """Mark the file complete and close it. Closing twice is fine.

        Raises:
            OSError: it could not be marked; it is closed, and can be read as it is.
        """
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        try:
            os.pwrite(fd, _WORD.pack(self.slots), 8 * HEAD_WORD)
            os.pwrite(fd, _WORD.pack(CLOSED), 8 * STATE_WORD)
        finally:
            os.close(fd)


def _write(fd: int, data: memoryview, at: int) -> None:
    """Write all of it: a full disk may take a part, and then the next call says why."""
    done = 0
    while done < len(data):
        written = os.pwrite(fd, data[done:], at + done)
        if not written:
            raise OSError(errno.EIO, "nothing more could be written")
        done += written


def trace_header(
    layout: Layout,
    meta: dict[str, Any],
    *,
    like: Header | None = None,
    closed: bool = False,
    compressed: bool = False,
) -> bytes:
    """The header of a new trace file.

    Args:
        layout: of its slots.
        meta: facts for the header.
        like: the header of the run that is written again: its process and its clocks are taken over.
        closed: the file is complete with what is written now.
        compressed: frames follow, see `kvhook.ring.frames`.
    """
    pid = os.getpid()
    header = bytearray(
        pack_header(
            layout,
            meta,
            capacity=0,
            pid=like.pid if like else pid,
            process_start=like.process_start if like else process_start(pid),
            clocks=(like.monotonic_ns, like.realtime_ns) if like else (time.monotonic_ns(), time.time_ns()),
            crc=False,
            version=COMPRESSED << 32 if compressed else VERSION,
        )
    )
    if closed:
        _WORD.pack_into(header, 8 * STATE_WORD, CLOSED)
    return bytes(header)


def pack_meta(layout: Layout, engine: int, meta: dict[str, Any]) -> Slots:
    """Facts about an engine as slots of a trace: JSON, cut into as many pieces as it takes."""
    import numpy as np

    text = json.dumps(meta, default=str).encode()
    room = layout.meta_bytes_per_slot
    parts = -(-len(text) // room)
    pack = layout.struct_of("meta", tail=f"{room}s").pack
    raw = bytearray()
    for part in range(parts):
        piece = text[part * room : (part + 1) * room]
        body = pack(part, META, engine, part, parts, len(piece), piece)
        # facts steer how all the rest is read, and there are few of them: they always carry a crc
        raw += _WORD.pack(2 * part + 2) + _WORD.pack(zlib.crc32(body)) + body
    return np.frombuffer(raw, np.uint8).reshape(parts, layout.slot_bytes)
