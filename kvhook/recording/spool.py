"""The whole run on disk: a thread copies raw slots from the rings to trace files, nothing per record in Python."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kvhook.ring.layout import Layout
from kvhook.ring.place import pid_namespace
from kvhook.ring.reader import RingReader
from kvhook.ring.trace_file import TraceWriter

if TYPE_CHECKING:
    from kvhook.recording.recorder import Recorder
    from kvhook.ring.reader import Batch

#: Seconds between two looks at the rings: while nothing happens, and at the least and the most while an engine works.
#: The longer, the less it takes from the engine's thread: what a look costs is waking up with cold caches.
INTERVAL, SHORTEST, LONGEST = 0.2, 0.005, 1.0
#: A bounded history is cut into so many files, of which the oldest goes when the bound is reached.
SEGMENTS = 8

#: Slots that are copied at a time: some 2 MB, so that they are still in the processor's cache when they are written.
BATCH = 4096

_WRITING, _THEN = "writing the trace", "records are counted as lost until it can be written again"


def next_pause(taken: int, seconds: float, capacity: int, last: float) -> float:
    """How long the spool may rest: until an eighth of the smallest ring is full at the present rate.

    Args:
        taken: records that came in the last `seconds`.
        seconds: since it came before.
        capacity: of the smallest ring.
        last: the last pause, of which the next one is twice as long at most.
    """
    if not taken:
        return INTERVAL  # nobody works: then it costs nobody anything to be ready for a burst
    return max(SHORTEST, min(capacity / 8 * seconds / taken, 2 * last, LONGEST))


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
        #: Records that could not be written (disk full, directory gone), per engine.
        self.unwritten: dict[int, int] = {}
        #: Records that the spool has come to, per engine.
        self.published: dict[int, int] = {}
        #: Engines that are gone, of which the last records are still to be drained.
        self._leaving: deque[int] = deque()
        #: Engines whose facts are still to be written to the file that is in use.
        self._owed: set[int] = set()
        #: Records that fell out of a bounded history.
        self.dropped = 0

    def add(self, recorder: Recorder) -> None:
        """Begin to drain an engine's ring. The thread is started with the first one.

        Raises:
            OSError: the ring has vanished.
        """
        number = recorder.number
        with self._lock:
            self._engines[number] = _Engine(recorder, RingReader(recorder.ring.path, 0))
            self._metas[number] = recorder.meta
            self.overrun[number] = self.unwritten[number] = self.published[number] = 0
            self._owed.add(number)
            try:
                self._settle(number, self._file_for(recorder.ring.layout))
            except OSError as error:
                self._fault(_WRITING, error, _THEN)
            if self._thread is None and not self._stopped:
                self._thread = threading.Thread(target=self._run, name="kvhook-spool", daemon=True)
                self._thread.start()

    def remove(self, number: int) -> None:
        """Drain an engine for the last time, and put its count of records into the file."""
        with self._lock:
            self._remove(number)

    def leave(self, number: int) -> None:
        """The same, and its ring is closed; at once if nobody else is at work here, else when they have done.

        It waits for nothing, since it is called from finalizers: the garbage collector runs them in any thread at any
        moment, also in one that holds the lock.
        """
        self._leaving.append(number)
        if self._lock.acquire(blocking=False):
            try:
                self._let_go()
            finally:
                self._lock.release()

    def _let_go(self) -> None:
        while self._leaving:
            engine = self._remove(self._leaving.popleft())
            if engine is not None:
                engine.recorder.close()

    def _remove(self, number: int) -> _Engine | None:
        engine = self._engines.get(number)
        if engine is None:
            return None
        try:
            self._drain(engine)
            file = self._file_for(engine.recorder.ring.layout)
            self._settle(number, file)
            file.append_meta(number, self._counts(number))
        except OSError as error:
            self._fault(_WRITING, error, _THEN)
        except Exception as error:
            self._fault("draining the ring", error, "what was not drained yet is counted as lost")
        del self._engines[number]
        engine.reader.close()
        return engine

    def tell_again(self, number: int) -> None:
        """Write the facts about an engine once more, at the next look at its ring: they have changed. Takes no lock,
        so that the engine's own thread may call it."""
        self._owed.add(number)

    def drain(self) -> int:
        """Bring the files up to now; gives the number of records that were taken over."""
        with self._lock:
            self._let_go()
            taken = 0
            for number, engine in self._engines.items():
                taken += self._drain(engine)
                if number in self._owed:  # told again, and no record has come since
                    try:
                        self._settle(number, self._file_for(engine.recorder.ring.layout))
                    except OSError as error:
                        self._fault(_WRITING, error, _THEN)
            return taken

    def paths(self) -> list[Path]:
        """The files, oldest first."""
        with self._lock:
            return [f.path for f in self._files]

    def open(self) -> tuple[list[Path], list[int], dict[int, dict[str, int]]]:
        """The files, oldest first, a descriptor of each, and how many records of each engine came and were lost.

        Raises:
            OSError: a file is no longer there.
        """
        with self._lock:
            opened: list[int] = []
            try:
                for file in self._files:
                    opened.append(file.descriptor())
            except OSError:
                for fd in opened:
                    os.close(fd)
                raise
            return [f.path for f in self._files], opened, {number: self._counts(number) for number in self.published}

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
        pause, last = INTERVAL, time.monotonic()
        while not self._wake.wait(pause):
            try:
                taken = self.drain()
            except Exception as error:
                self._fault("draining the ring", error, "the records stay in the ring until it comes round")
                continue
            now = time.monotonic()
            smallest = min((e.recorder.ring.capacity for e in list(self._engines.values())), default=1)
            pause, last = next_pause(taken, now - last, smallest, pause), now

    def _drain(self, engine: _Engine) -> int:
        taken = 0
        while True:
            batch = engine.reader.poll(BATCH)
            self._take(engine, batch)
            taken += len(batch.slots)
            if len(batch.slots) + batch.lost < BATCH:
                return taken

    def _take(self, engine: _Engine, batch: Batch) -> None:
        number = engine.recorder.number
        self.overrun[number] += batch.lost
        self.published[number] = engine.reader.cursor
        if not len(batch.slots):
            return
        file, before = None, -1
        try:
            file = self._file_for(engine.recorder.ring.layout)
            self._settle(number, file)
            before = file.slots
            file.append(batch.slots)
        except OSError as error:
            there = file.slots - before if file and before >= 0 else 0
            self.unwritten[number] += len(batch.slots) - there
            self._fault(_WRITING, error, _THEN)

    def _settle(self, number: int, file: TraceWriter) -> None:
        """Write the facts about an engine that could not be written so far."""
        if number in self._owed:
            self._owed.discard(number)
            try:
                file.append_meta(number, self._metas[number])
            except OSError:
                self._owed.add(number)
                raise

    def _counts(self, number: int) -> dict[str, int]:
        return {
            "records_published": self.published[number],
            "records_overrun": self.overrun[number],
            "records_unwritten": self.unwritten[number],
        }

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
            with contextlib.suppress(OSError):
                oldest.close()
            oldest.path.unlink(missing_ok=True)
        return self._new_file(layout)

    def _new_file(self, layout: Layout) -> TraceWriter:
        meta = {key: value for key, value in next(iter(self._metas.values())).items() if key in ("kvhook", "vllm")}
        file = TraceWriter(self._new_path(self._made), layout, meta | {"pid_namespace": pid_namespace()})
        self._made += 1
        self._files.append(file)
        self._owed |= {number for number, e in self._engines.items() if e.recorder.ring.layout == layout}
        for number in sorted(self._owed):
            if number in self._engines and self._engines[number].recorder.ring.layout == layout:
                self._settle(number, file)
        return file
