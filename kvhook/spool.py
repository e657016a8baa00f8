"""The whole run on disk: a thread copies raw slots from the rings to trace files, nothing per record in Python."""

from __future__ import annotations

import json
import os
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kvhook.ring.layout import CLOSED, HEAD_WORD, STATE_WORD, Layout, pack_header
from kvhook.ring.place import create_file, process_start
from kvhook.ring.reader import RingReader
from kvhook.schema import META

if TYPE_CHECKING:
    from kvhook.recorder import Recorder
    from kvhook.ring.reader import Slots

TRACE_SUFFIX = ".kvh"
#: Seconds between two looks at the rings: five short wake-ups a second.
INTERVAL = 0.2
#: A bounded history is cut into so many files, of which the oldest goes when the bound is reached.
SEGMENTS = 8

_WORD = struct.Struct("<Q")


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
        self.header_bytes = self.size = len(header)
        os.pwrite(self._fd, header, 0)

    @property
    def slots(self) -> int:
        """Slots in the file."""
        return (self.size - self.header_bytes) // self.layout.slot_bytes

    def append(self, slots: Slots) -> None:
        """Append raw slots.

        Raises:
            OSError: they were not written, or not all; the file still ends with the last whole batch.
        """
        data = slots.ravel().data  # a view where the slots are contiguous, as they come from the ring
        done = 0
        while done < len(data):
            done += os.pwrite(self._fd, data[done:], self.size + done)
        self.size += done

    def append_meta(self, engine: int, meta: dict[str, Any]) -> None:
        """Append a piece of metadata about an engine; what comes later in the file counts."""
        self.append(pack_meta(self.layout, engine, meta))

    def close(self) -> None:
        """Mark the file complete and close it. Closing twice is fine."""
        if self._fd >= 0:
            os.pwrite(self._fd, _WORD.pack(self.slots), 8 * HEAD_WORD)
            os.pwrite(self._fd, _WORD.pack(CLOSED), 8 * STATE_WORD)
            os.close(self._fd)
            self._fd = -1


def trace_header(layout: Layout, meta: dict[str, Any], *, closed: bool = False) -> bytes:
    """The header of a new trace file."""
    header = bytearray(
        pack_header(
            layout,
            meta,
            capacity=0,
            pid=os.getpid(),
            process_start=process_start(os.getpid()),
            clocks=(time.monotonic_ns(), time.time_ns()),
            crc=False,
        )
    )
    if closed:
        header[8 * STATE_WORD : 8 * STATE_WORD + 8] = _WORD.pack(CLOSED)
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
        raw += _WORD.pack(2 * part + 2) + _WORD.pack(0)
        raw += pack(part, META, engine, part, parts, len(piece), piece)
    return np.frombuffer(raw, np.uint8).reshape(parts, layout.slot_bytes)


class _Engine(NamedTuple):
    """An engine that is being drained."""

    recorder: Recorder
    reader: RingReader


class Spool:
    """Drains rings into trace files in the background.

    Args:
        new_path: gives the path of the next file; called with its number, from 0.
        limit: bytes on disk, above which the oldest part is dropped and counted; None for no limit.
        fault: is told of errors (where, error, what happens then). They are never raised: the thread goes on.
    """

    def __init__(
        self, new_path: Callable[[int], Path], limit: int | None, fault: Callable[[str, BaseException, str], None]
    ) -> None:
        self._new_path = new_path
        self._limit = limit
        self._fault = fault
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._stopped = False
        self._engines: dict[int, _Engine] = {}
        self._metas: dict[int, dict[str, Any]] = {}
        self._files: list[TraceWriter] = []
        self._made = 0
        #: Records that were overwritten in the ring before the spool came, per engine.
        self.overrun: dict[int, int] = {}
        #: Records that could not be written (disk full, directory gone).
        self.unwritten = 0
        #: Records that fell out of a bounded history.
        self.dropped = 0

    def add(self, recorder: Recorder) -> None:
        """Begin to drain an engine's ring. The thread is started with the first one."""
        with self._lock:
            self._engines[recorder.number] = _Engine(recorder, RingReader(recorder.ring.path, 0))
            self._metas[recorder.number] = recorder.meta
            self.overrun[recorder.number] = 0
            try:
                self._file_for(recorder.ring.layout).append_meta(recorder.number, recorder.meta)
            except OSError as error:
                self._fault("writing the trace", error, "records are counted as lost until it can be written again")
            if self._thread is None and not self._stopped:
                self._thread = threading.Thread(target=self._run, name="kvhook-spool", daemon=True)
                self._thread.start()

    def remove(self, number: int) -> None:
        """Drain an engine for the last time."""
        with self._lock:
            engine = self._engines.pop(number, None)
            if engine is not None:
                self._drain(engine)
                engine.reader.close()

    def drain(self) -> int:
        """Bring the files up to now; gives the number of records that were taken over."""
        with self._lock:
            return sum(self._drain(e) for e in self._engines.values())

    def paths(self) -> list[Path]:
        """The files, oldest first."""
        with self._lock:
            return [f.path for f in self._files]

    def close(self) -> None:
        """Drain, stop the thread, and complete the files. Closing twice is fine."""
        self._stopped = True
        self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
            self._thread = None
        for number in list(self._engines):
            self.remove(number)
        with self._lock:
            for file in self._files:
                try:
                    file.close()
                except OSError as error:
                    self._fault("closing the trace", error, "it ends with the last whole record")

    def _run(self) -> None:
        pause = INTERVAL
        while not self._wake.wait(pause):
            try:
                taken = self.drain()
            except Exception as error:
                self._fault("draining the ring", error, "the records stay in the ring until it comes round")
                continue
            # come again sooner when a good part of a ring was full
            smallest = min((e.recorder.ring.capacity for e in list(self._engines.values())), default=1)
            pause = INTERVAL if taken < smallest // 8 else 0.0 if taken > smallest // 2 else INTERVAL / 20

    def _drain(self, engine: _Engine) -> int:
        batch = engine.reader.poll()
        self.overrun[engine.recorder.number] += batch.lost
        if not len(batch.slots):
            return 0
        try:
            self._file_for(engine.recorder.ring.layout).append(batch.slots)
        except OSError as error:
            self.unwritten += len(batch.slots)
            self._fault("writing the trace", error, "records are counted as lost until it can be written again")
        return len(batch.slots)

    def _file_for(self, layout: Layout) -> TraceWriter:
        """The file that takes slots of this layout at this moment."""
        current = next((f for f in reversed(self._files) if f.layout == layout), None)
        if current is None:
            return self._new_file(layout)
        if self._limit is None or current.size < self._limit // SEGMENTS:
            return current
        while sum(f.size for f in self._files) > self._limit - self._limit // SEGMENTS:
            oldest = self._files.pop(0)
            self.dropped += oldest.slots
            oldest.close()
            oldest.path.unlink(missing_ok=True)
        return self._new_file(layout)

    def _new_file(self, layout: Layout) -> TraceWriter:
        meta = {key: value for key, value in next(iter(self._metas.values())).items() if key in ("kvhook", "vllm")}
        file = TraceWriter(self._new_path(self._made), layout, meta)
        self._made += 1
        self._files.append(file)
        for number, facts in self._metas.items():
            if number in self._engines and self._engines[number].recorder.ring.layout == layout:
                file.append_meta(number, facts)
        return file
