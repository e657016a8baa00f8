"""The whole run on disk: a thread copies raw slots from the rings to trace files, with no Python per record."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from kvhook.facts import ANONYMOUS
from kvhook.faults import contained, is_users
from kvhook.recording.background import Background
from kvhook.recording.clocks import read_clocks
from kvhook.recording.launched import RUNS
from kvhook.recording.pauses import INTERVAL, next_pause
from kvhook.recording.segments import Segments
from kvhook.ring.layout import Layout
from kvhook.ring.place import pid_namespace
from kvhook.ring.reader import RingReader
from kvhook.ring.trace_file import TraceWriter

if TYPE_CHECKING:
    from kvhook.recording.notebook import Notebook
    from kvhook.ring.writer import RingWriter

#: Slots that are copied at a time: some 2 MB, so that they are still in the processor's cache when they are written.
BATCH = 4096

#: So many records make it worth while to add them up.
KEEP_UP = 4096

#: Seconds between two readings of the clocks in a trace.
CLOCK_EVERY = 10.0

#: The seam at which a file is written, and what happens after an error there.
WRITING, _THEN = "writing the trace", "records are counted as lost until it can be written again"
_DRAINING = "draining the ring"


class Recorded(Protocol):
    """What the spool needs of a recorder: the number of its engine, facts about it, and its ring."""

    number: int
    meta: dict[str, Any]
    ring: RingWriter

    def close(self) -> None:
        """Mark the ring closed."""


class _Engine(NamedTuple):
    """An engine that is being drained."""

    recorder: Recorded
    reader: RingReader


class Spool:
    """Drains rings into trace files in the background.

    Args:
        new_paths: returns the paths that the next file may have, of which the first that is free is taken; called with
            its number, from 0.
        limit: bytes on disk, above which the oldest part is dropped and counted; None for no limit.
        fault: is called with errors (where, error, what happens then). None is raised: the thread goes on.
        keep_up: is called by the thread when `KEEP_UP` records have come since it was called last.
        notes: what is written beside the records.
    """

    def __init__(
        self,
        new_paths: Callable[[int], Iterable[Path]],
        limit: int | None,
        fault: Callable[[str, BaseException, str], None],
        keep_up: Callable[[], None] | None = None,
        notes: Notebook | None = None,
    ) -> None:
        self._notes = notes
        #: when both clocks were written last
        self._clock_read = 0
        self._keep_up, self._behind = keep_up, 0
        self._fault = fault
        self._lock = threading.Lock()
        self._background = Background(self._run, "kvhook-spool", self._no_thread)
        self._engines: dict[int, _Engine] = {}
        self._metas: dict[int, dict[str, Any]] = {}
        self._files = Segments(new_paths, limit)
        #: Records that were overwritten in the ring before they were copied, per engine.
        self.overrun: dict[int, int] = {}
        #: Records that could not be written (disk full, directory gone), per engine.
        self.unwritten: dict[int, int] = {}
        #: Records that the spool has reached, per engine.
        self.published: dict[int, int] = {}
        #: Engines that are gone and whose last records are still to be drained.
        self._retiring: deque[int] = deque()
        #: What is called when the thread has completed the files, if it is to do that.
        self._then: Callable[[], None] | None = None
        #: Whether `close` has completed the files.
        self.is_closed = False
        #: Engines whose facts are still to be written to the file that is in use.
        self._meta_due: set[int] = set()

    def add(self, recorder: Recorded) -> None:
        """Begin to drain an engine's ring. The thread is started with the first one, or as soon as that is possible.

        Raises:
            OSError: the ring has vanished.
        """
        number = recorder.number
        with self._lock:
            self._engines[number] = _Engine(recorder, RingReader(recorder.ring.path, 0))
            self._metas[number] = recorder.meta
            self.overrun[number] = self.unwritten[number] = self.published[number] = 0
            self._meta_due.add(number)
            with contained(lambda error: self._fault(WRITING, error, _THEN)):
                self._write_due_meta(number, self._file_for(recorder.ring.layout))
            self._background.begin()

    def _no_thread(self, error: BaseException) -> None:
        self._fault(
            "starting the thread that writes the trace",
            error,
            "it is tried again with the next engine and whenever the recording is read; until then records stay in the "
            "ring, and what is overwritten there is counted as lost",
        )

    def retire(self, number: int) -> None:
        """Drain an engine for the last time and close its ring: now if the lock is free, else at the next drain.

        It waits for nothing, since finalizers call it: the garbage collector runs them in any thread at any moment,
        also in a thread that holds the lock.
        """
        self._retiring.append(number)
        if self._lock.acquire(blocking=False):
            try:
                self._close_retired()
            finally:
                self._lock.release()

    def leave(self, number: int, then: Callable[[], None]) -> None:
        """Retire the only engine that this spool will ever have: its thread completes the files, calls `then`, and
        ends. As `retire`, this waits for nothing."""
        self._then = then
        self.retire(number)
        self._background.leave()

    def _close_retired(self) -> None:
        while self._retiring:
            engine = self._drain_finally(self._retiring.popleft())
            if engine is not None:
                engine.recorder.close()

    def _drain_finally(self, number: int) -> _Engine | None:
        """Drain an engine for the last time, and put its count of records into the file."""
        engine = self._engines.get(number)
        if engine is None:
            return None
        try:
            self._drain(engine)
        except BaseException as error:
            if is_users(error):
                raise
            left = max(0, engine.recorder.ring.head - engine.reader.cursor)
            self.unwritten[number] += left
            self.published[number] += left
            self._fault(_DRAINING, error, "what was not drained yet is counted as lost")
        with contained(lambda error: self._fault(WRITING, error, _THEN)):
            file = self._file_for(engine.recorder.ring.layout)
            self._write_due_meta(number, file)
            file.append_meta(number, self._counts(number))
        del self._engines[number]
        engine.reader.close()
        return engine

    def write_meta_again(self, number: int) -> None:
        """Write the facts about an engine once more when its ring is drained next, because they have changed.

        Takes no lock, so that the engine's own thread may call it.
        """
        self._meta_due.add(number)

    def drain(self) -> int:
        """Bring the files up to date; returns the number of records that were copied.

        Raises:
            Exception: an engine's records could not be copied, and are still in its ring. Those of others were.
        """
        with self._lock:
            self._background.begin()
            self._write_notes()
            self._close_retired()
            taken, failed = 0, None
            for number, engine in self._engines.items():
                try:
                    taken += self._drain(engine)
                except BaseException as error:
                    if is_users(error):
                        raise
                    failed = failed or error
                    continue
                if number in self._meta_due:  # its facts have changed, and no record has come since
                    try:
                        self._write_due_meta(number, self._file_for(engine.recorder.ring.layout))
                    except OSError as error:
                        self._fault(WRITING, error, _THEN)
            if failed is not None:
                raise failed
            if taken:
                self._write_clock()
        self.write_events()  # what came meanwhile
        return taken

    def write_events(self) -> None:
        """Write what waits to be written beside the records. Waits for nothing: if another thread writes at this
        moment, that thread writes it."""
        while self._notes is not None and self._notes.due and self._files.files and self._lock.acquire(blocking=False):
            try:
                if not self._write_notes():
                    return
            finally:
                self._lock.release()

    def _write_notes(self) -> bool:
        """Write what waits beside the records, to the newest file of each kind. False if it could not be written."""
        events = self._notes.take() if self._notes is not None and self._files.files else []
        if not events:
            return True
        try:
            for file in self._files.newest():
                file.append_meta(file.engine, {"events": events})
        except BaseException as error:
            assert self._notes is not None
            self._notes.put_back(events)
            if is_users(error) or not isinstance(error, OSError):
                raise
            self._fault(WRITING, error, _THEN)
            return False
        return True

    def _write_clock(self) -> None:
        """Write what both clocks show, now and then: the one that is recorded, and the time since 1970."""
        now = time.monotonic_ns()
        if now - self._clock_read < CLOCK_EVERY * 1e9:
            return
        try:
            for file in self._files.newest():
                file.append_meta(file.engine, {"events": [["clock", *read_clocks()]]})
            self._clock_read = now
        except OSError as error:
            self._fault(WRITING, error, _THEN)

    def paths(self) -> list[Path]:
        """The files, oldest first."""
        with self._lock:
            return [file.path for file in self._files.files]

    def open(self) -> tuple[list[Path], list[int], dict[int, dict[str, int]]]:
        """The files, oldest first, a descriptor of each, and how many records of each engine came and were lost.

        Raises:
            OSError: a file is no longer there.
        """
        with self._lock:
            opened = self._files.descriptors()
            return [file.path for file in self._files.files], opened, self.counts()

    def close(self) -> None:
        """Drain, stop the thread, and complete the files. Closing twice is fine."""
        self._background.end()
        with self._lock:
            for number in list(self._engines):
                self._drain_finally(number)
            with contained(lambda error: self._fault(WRITING, error, _THEN)):
                self._write_notes()
            for file in self._files.files:
                with contained(self._not_closed):
                    file.close()
        self.is_closed = True

    def _not_closed(self, error: BaseException) -> None:
        self._fault("closing the trace", error, "it ends with the last whole record")

    def _run(self) -> None:
        pause, last = INTERVAL, time.monotonic()
        while not self._background.wait(pause):
            try:
                taken = self.drain()
            except BaseException as error:  # whatever it is: the thread goes on
                self._fault(_DRAINING, error, "it is tried again; the records stay in the ring until it comes round")
                continue
            self._add_up(taken)
            now = time.monotonic()
            smallest = min((e.recorder.ring.capacity for e in list(self._engines.values())), default=1)
            pause, last = next_pause(taken, now - last, smallest, pause), now
        if self._then is not None:
            with contained(self._not_closed):
                self.close()
                self._then()

    def _add_up(self, taken: int) -> None:
        self._behind += taken
        if self._keep_up is None or self._behind < KEEP_UP:
            return
        self._behind = 0
        try:
            self._keep_up()
        except BaseException as error:
            self._fault("adding up the run", error, "a summary takes longer: it reads what has not been added up")

    def _drain(self, engine: _Engine) -> int:
        taken = 0
        while True:
            before = engine.reader.cursor
            taken += self._take(engine)
            if engine.reader.cursor - before < BATCH:
                return taken

    def _take(self, engine: _Engine) -> int:
        """Copy a batch; returns how many records it had. What could not be written for another reason than the disk
        stays in the ring, for the next time.

        Raises:
            Exception: whatever was raised on the way, but no OSError.
        """
        number, reader = engine.recorder.number, engine.reader
        at = reader.cursor, reader.lost
        batch, file, before = None, None, 0
        try:
            batch = reader.poll(BATCH)
            if len(batch.slots):
                current = self._file_for(engine.recorder.ring.layout)
                self._write_due_meta(number, current)
                file, before = current, current.slots
                current.append(batch.slots)
        except BaseException as error:
            written = file.slots - before if file is not None else 0
            if batch is None:
                reader.cursor, reader.lost = at
            elif is_users(error) or not isinstance(error, OSError):
                reader.put_back(batch, written)
            else:
                self.unwritten[number] += len(batch.slots) - written
                self._fault(WRITING, error, _THEN)
                return len(batch.slots)
            raise
        finally:
            self.overrun[number] = reader.lost
            self.published[number] = reader.cursor
        return len(batch.slots)

    def _write_due_meta(self, number: int, file: TraceWriter) -> None:
        """Write the facts about an engine that could not be written so far."""
        if number in self._meta_due:
            self._meta_due.discard(number)
            try:
                file.append_meta(number, self._metas[number])
            except BaseException:
                self._meta_due.add(number)
                raise

    def counts(self) -> dict[int, dict[str, int]]:
        """How many records of each engine came and were lost so far. Takes no lock."""
        return {number: self._counts(number) for number in list(self.published)}

    def _counts(self, number: int) -> dict[str, int]:
        return {
            "records_published": self.published[number],
            "records_overrun": self.overrun[number],
            "records_unwritten": self.unwritten[number],
        }

    def _file_for(self, layout: Layout) -> TraceWriter:
        """The file that takes slots of this layout at this moment."""
        return self._files.current(layout) or self._new_file(layout)

    def _new_file(self, layout: Layout) -> TraceWriter:
        told = next(iter(self._metas.values()))
        core = ("engine", "pid", "own_process") if "stream" in told else ()
        names = ("kvhook", "vllm", "stream", "session", RUNS, *core)
        meta = {key: told[key] for key in names if key in told}
        mine = {number for number, e in self._engines.items() if e.recorder.ring.layout == layout}
        self._meta_due |= mine
        if not told.get(ANONYMOUS):  # where to look for what is lacking if this process is killed
            meta["rings"] = str(next(iter(self._engines.values())).recorder.ring.path.parent.absolute())
        file = self._files.begin(layout, meta | {"pid_namespace": pid_namespace()})
        file.engine = min(mine, default=0)
        for number in sorted(mine):
            self._write_due_meta(number, file)
        if self._notes is not None and (events := self._notes.everything()):
            file.append_meta(file.engine, {"events": events})
        return file
