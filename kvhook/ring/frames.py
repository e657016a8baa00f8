"""Compressed traces: the header of a trace in layout 2, then frames, each of some thousands of slots.

::

    frame (little endian)
        0  8 bytes "KVHFRAME"       8  u32 slots in the frame      12  u32 bytes of the payload
       16  u32 method: 1 zlib, 2 zstd                              20  u32 crc32 of the payload
       24  u32 crc32 of the bytes above                            28  u32 0
    payload, compressed by that method
        u64 for each 8-byte word of a slot: bit p (0 to 7) is set if plane p of this word is there; bit 8 if what stands
        there are differences to the slot before; bit 9 if the word before it in the slot has been taken off first
        the planes that are there, one byte for each slot: word 0 planes 0 to 7, word 1 planes 0 to 7, ...

The slots of a frame are sorted by word 3 (kind and engine), stably; word 3 itself stands in the order of the file, so
that the order can be found again. Plane p of a word is byte p of what stands for it: of the word itself, or of its
difference to the slot before, to the word before, or to both, whichever has the fewest bytes that are not zero. What
does not change, or is always zero, takes next to nothing, and what grows by small steps takes one byte before it is
compressed.

A frame is read whole or not at all: a file that was cut off opens up to its last whole frame.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from kvhook.errors import TraceFormatError

try:
    import zstandard as _zstandard
except ImportError:
    zstandard: Any = None
else:
    zstandard = _zstandard

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from kvhook.ring.slots import Slots

MAGIC = b"KVHFRAME"
_HEAD = struct.Struct("<8s6I")
_CHECKED = _HEAD.size - 8
#: Slots in a frame.
SLOTS = 8192
#: No frame is larger: no allocation follows a number in a file further than this.
_MOST_SLOTS, _MOST_BYTES = 1 << 16, 1 << 28
#: Nor does one hold more than so many times its own bytes, beyond a small one: a file of this kvhook's is ten times as
#: long when it is unpacked.
_MOST_TIMES, _SMALL = 1024, 1 << 18
ZLIB, ZSTD = 1, 2
#: How a word is written, see above.
_SLOT_BEFORE, _WORD_BEFORE = 1 << 8, 1 << 9
#: The word of a slot that holds its kind and its engine.
_KIND_WORD = 3


class Frame(NamedTuple):
    """Where a frame's payload is in the file, and what its head says of it."""

    at: int
    nbytes: int
    slots: int
    method: int
    crc: int


def pack_frame(slots: Slots) -> bytes:
    """Slots as a frame, with zstd where it is installed, else with zlib."""
    method, compress = _compressor()
    payload = compress(_planes(slots))
    head = _HEAD.pack(MAGIC, len(slots), len(payload), method, zlib.crc32(payload), 0, 0)
    return head[:_CHECKED] + struct.pack("<2I", zlib.crc32(head[:_CHECKED]), 0) + payload


def frames_of(fd: int, first: int, size: int, name: str) -> list[Frame]:
    """The whole frames of a file.

    Args:
        fd: the file.
        first: where the first frame begins.
        size: length of the file.
        name: what to call it in errors.

    Raises:
        TraceFormatError: the head of a frame is damaged.
    """
    found: list[Frame] = []
    at = first
    while at + _HEAD.size <= size:
        head = os.pread(fd, _HEAD.size, at)
        magic, slots, nbytes, method, crc, check, _ = _HEAD.unpack(head)
        if magic != MAGIC or check != zlib.crc32(head[:_CHECKED]) or slots > _MOST_SLOTS or nbytes > _MOST_BYTES:
            raise TraceFormatError(f"{name}: frame {len(found)} is damaged, so what follows cannot be read")
        at += _HEAD.size
        if at + nbytes > size:
            break
        found.append(Frame(at, nbytes, slots, method, crc))
        at += nbytes
    return found


def read_frame(fd: int, frame: Frame, slot_bytes: int, name: str) -> Slots:
    """The slots of a frame.

    Raises:
        TraceFormatError: it is damaged, or what it was compressed with is not installed.
    """
    damaged = TraceFormatError(f"{name}: a frame of {frame.slots} records at byte {frame.at} is damaged")
    payload = os.pread(fd, frame.nbytes, frame.at)
    if len(payload) < frame.nbytes or zlib.crc32(payload) != frame.crc:
        raise damaged
    most = slot_bytes + slot_bytes * frame.slots
    if most > max(_SMALL, _MOST_TIMES * frame.nbytes):
        raise damaged
    try:
        data = _decompressor(frame.method, most, name)(payload)
        return _slots(data, frame.slots, slot_bytes)
    except TraceFormatError:
        raise
    except Exception:  # each library has errors of its own
        raise damaged from None


def _compressor() -> tuple[int, Callable[[bytes], bytes]]:
    if zstandard is None:
        return ZLIB, lambda data: zlib.compress(data, 6)
    return ZSTD, zstandard.ZstdCompressor(level=6).compress


def _decompressor(method: int, most: int, name: str) -> Callable[[bytes], bytes]:
    if method == ZLIB:
        return lambda data: zlib.decompressobj().decompress(data, most)
    if method != ZSTD:
        raise TraceFormatError(f"{name} was compressed by a way that this kvhook does not know")
    if zstandard is None:
        raise TraceFormatError(f'{name} was compressed with zstd: pip install "kvhook[fast]"')
    decompressor: Any = zstandard.ZstdDecompressor()

    def decompress(data: bytes) -> bytes:
        # where the payload says how long it is, zstandard believes that rather than max_output_size
        if zstandard.frame_content_size(data) > most:
            raise ValueError("a frame holds more than its slots")
        return bytes(decompressor.decompress(data, max_output_size=most))

    return decompress


def _planes(slots: Slots) -> bytes:
    import numpy as np

    words = np.ascontiguousarray(slots).view("<i8")
    order = np.argsort(words[:, _KIND_WORD], kind="stable")
    columns = np.take(np.ascontiguousarray(words.T), order, axis=1)
    columns[_KIND_WORD] = words[:, _KIND_WORD]
    mask = np.zeros(len(columns), "<u8")
    parts = []
    for i in np.flatnonzero(columns.any(axis=1)).tolist():
        best: Any = None
        for way, word in _ways(columns, i):
            planes = np.ascontiguousarray(word.view(np.uint8).reshape(-1, 8).T)
            counts = np.count_nonzero(planes, axis=1)
            if best is None or counts.sum() < best[1].sum():
                best = way, counts, planes
        way, counts, planes = best
        there = counts.nonzero()[0]
        mask[i] = way | int((1 << there).sum())
        parts.append(planes[there].tobytes())
    return mask.tobytes() + b"".join(parts)


def _ways(columns: npt.NDArray[np.int64], i: int) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """What can stand for a word, with its bits."""
    import numpy as np

    word = columns[i]
    yield _SLOT_BEFORE, np.diff(word, prepend=0)
    yield 0, word
    if i not in (0, _KIND_WORD, _KIND_WORD + 1):
        word = word - columns[i - 1]
        yield _WORD_BEFORE | _SLOT_BEFORE, np.diff(word, prepend=0)
        yield _WORD_BEFORE, word


def _slots(data: bytes, count: int, slot_bytes: int) -> Slots:
    import numpy as np

    width = slot_bytes // 8
    mask = np.frombuffer(data, "<u8", width)
    at = 8 * width
    columns: npt.NDArray[np.int64] = np.zeros((width, count), "<i8")
    raw = columns.view(np.uint8).reshape(width, count, 8)
    for i in mask.nonzero()[0].tolist():
        bits = int(mask[i])
        for p in range(8):
            if bits >> p & 1:
                raw[i, :, p] = np.frombuffer(data, np.uint8, count, at)
                at += count
        if bits & _SLOT_BEFORE:
            np.cumsum(columns[i], out=columns[i])
        if bits & _WORD_BEFORE:
            columns[i] += columns[i - 1]
    if at != len(data):
        raise ValueError("a frame holds more than its slots")
    order = np.argsort(columns[_KIND_WORD], kind="stable")
    words = np.empty((count, width), "<i8")
    kinds = columns[_KIND_WORD].copy()
    words[order] = columns.T
    words[:, _KIND_WORD] = kinds
    return words.view(np.uint8)
