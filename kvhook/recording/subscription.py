"""`kvhook.on_step`: steps handed to a function of the user's, in batches, on a thread of kvhook's own.

The ring is the queue: the engine's thread does nothing for it, and what the function is too slow for is overwritten
there and counted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from kvhook import forks
from kvhook.errors import KvhookError

if TYPE_CHECKING:
    from kvhook.recording.spool import Recorded
    from kvhook.ring.reader import RingReader
    from kvhook.ring.slots import Slots

Row = dict[str, Any]
Callback = Callable[[list[Row]], object]

#: Seconds between two batches, unless the user wants another pause.
EVERY = 1.0
#: Records that are read at a time.
_MOST = 2048
#: Seconds that the function has, when the recording ends, to take what is left.
PATIENCE = 10.0

_CALLBACK = "a function of on_step"


class Subscription:
    """Steps go to a function of the user's until `close`, or until the recording ends.

    Made by `kvhook.on_step`.

    Args:
        callback: is called with the steps since its last call, oldest first.
        every: seconds between two calls.
        recorders: gives the recorders of all engines so far.
        fault: is told of an error of the function (where, error, what happens then).
    """

    def __init__(
        self,
        callback: Callback,
        every: float,
        recorders: Callable[[], Sequence[Recorded]],
        fault: Callable[[str, BaseException, str], None],
    ) -> None:
        if not callable(callback):
            raise KvhookError(f"on_step() takes a function that is called with a list of steps, not {callback!r}")
        if not 0 < every <= 3600:
            raise KvhookError(f"every={every!r}: seconds between two calls, above 0 and up to 3600")
        self._callback, self._every = callback, every
        self._recorders, self._fault = recorders, fault
        self._wake = threading.Event()
        self._readers: dict[str, RingReader] = {}
        self._done: dict[str, int] = {}
        self._made_in = forks.generation
        #: whether the function wants no more steps
        self._ended = False
        #: steps that were handed over
        self.steps = 0
        self._find(from_now=True)
        self._thread = threading.Thread(target=self._run, name="kvhook-on-step", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            for reader in self._readers.values():
                reader.close()
            raise KvhookError(f"on_step() needs a thread of its own, and none could be started: {error}") from None

    @property
    def dropped(self) -> int:
        """Records (of steps, requests and latencies) that were overwritten before the function was ready for them."""
        return sum(self._done.values()) + sum(reader.lost for reader in list(self._readers.values()))

    def close(self) -> None:
        """Hand over what has come so far, and stop. Closing twice is fine."""
        if self._made_in != forks.generation:
            return  # the thread is the parent's
        self._wake.set()
        if self._thread is not threading.current_thread():
            self._thread.join(PATIENCE)

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        ends = False
        while not ends:
            ends = self._wake.wait(self._every)
            try:
                self._find()
                for name in list(self._readers):
                    self._take(name)
            except BaseException as error:  # whatever it is: the thread goes on
                self._fault("reading the ring for on_step", error, "it is tried again")
        for reader in self._readers.values():
            reader.close()

    def _find(self, *, from_now: bool = False) -> None:
        """Open the rings of engines that are new."""
        from kvhook.ring.reader import RingReader

        for recorder in self._recorders():
            name = str(recorder.ring.path)
            if name not in self._readers and name not in self._done:
                reader = self._readers[name] = RingReader(recorder.ring.path, 0)
                if from_now:
                    reader.cursor = reader.head

    def _take(self, name: str) -> None:
        """Hand over what has come in one ring."""
        reader = self._readers[name]
        over = reader.closed  # looked at before the records are
        while True:
            batch = reader.poll(_MOST)
            rows = step_rows(batch.slots, reader) if len(batch.slots) else []
            if rows and not self._ended:
                self.steps += len(rows)
                try:
                    self._callback(rows)
                except BaseException as error:
                    self._failed(error)
            if len(batch.slots) + batch.lost < _MOST:
                break
        if over:
            self._done[name] = reader.lost
            del self._readers[name]
            reader.close()

    def _failed(self, error: BaseException) -> None:
        """The user's function has failed. ``sys.exit()`` in it ends what it is in, which is this thread."""
        if isinstance(error, SystemExit):
            self._ended = True
            self._wake.set()
            self._fault(_CALLBACK, error, "it ended itself with sys.exit(), and is not called again")
        else:
            self._fault(_CALLBACK, error, "it is called again with the next steps")


def step_rows(slots: Slots, reader: RingReader) -> list[Row]:
    """The steps among some slots of a ring as dictionaries: the columns of a step, and ``time``."""
    from kvhook.records.rows import rows
    from kvhook.trace import from_slots

    header = reader.header
    behind = header.realtime_ns - header.monotonic_ns
    found = []
    for kind, part in rows(from_slots(slots, header, str(reader.path))):
        if kind == "step":
            found += [{**row, "time": (row["t_end_ns"] + behind) / 1e9} for row in part]
    return found
