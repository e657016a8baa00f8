"""`kvhook.on_step`: steps handed to a function of the user's, in batches, on a thread of kvhook's own.

The ring is the queue: the engine's thread does nothing for it, and what the function is too slow for is overwritten
there and counted.
"""

from __future__ import annotations

import inspect
import numbers
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
_LEFT = "handing all steps to a function of on_step"
_TAKES = "callback: on_step() takes a function that is called with a list of steps"
_NOT_AWAITED = (
    "nothing of it would run. Give a plain function; into an event loop it can hand the steps over with "
    "asyncio.run_coroutine_threadsafe(send(steps), loop)"
)


def check_arguments(callback: object, every: object) -> None:
    """Raises `KvhookError` for what `kvhook.on_step` cannot use."""
    check_callback(callback)
    if isinstance(every, bool) or not isinstance(every, numbers.Real) or not 0 < float(every) <= 3600:
        raise KvhookError(f"every={every!r}: a number of seconds between two calls, above 0 and up to 3600")


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
        check_arguments(callback, every)
        self._callback, self._every = callback, float(every)
        self._recorders, self._fault = recorders, fault
        self._wake = threading.Event()
        self._readers: dict[str, RingReader] = {}
        self._done: dict[str, int] = {}
        self._made_in = forks.generation
        #: whether the function wants no more steps
        self._ended = False
        #: whether it turned out to be none that steps can be handed to
        self._refused = False
        #: held while records are taken out of a ring and counted, never while the function works
        self._gate = threading.Lock()
        #: ring -> the records that it had when `close` was called: so many are to be handed over
        self._until: dict[str, int] | None = None
        #: whether it is over: nothing is handed over any more, and `_left` were not
        self._over = False
        self._left = 0
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
        """Records (of steps, requests and latencies) that the function did not get: they were overwritten before it was
        ready for them, it had ended itself with ``sys.exit()``, or it was busy still when the subscription had ended
        and its time was up."""
        return self._left + sum(self._done.values()) + sum(reader.lost for reader in list(self._readers.values()))

    def close(self) -> None:
        """Hand over what has come so far, and stop. Closing twice is fine.

        The function has 10 seconds for it. What it has not got by then is counted in `dropped`, and said.
        """
        if self._made_in != forks.generation:
            return  # the thread is the parent's
        if self._until is None:
            self._until = {str(recorder.ring.path): recorder.ring.head for recorder in self._recorders()}
        self._wake.set()
        if self._thread is not threading.current_thread():
            try:
                self._thread.join(PATIENCE)
            finally:
                self._end()

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
        self._end()
        for reader in self._readers.values():
            reader.close()

    def _end(self) -> None:
        """Nothing is handed over any more: count what was not, and say so."""
        with self._gate:
            if self._over:
                return
            self._over = True
            for name, head in (self._until or {}).items():
                if name not in self._done:
                    self._left += max(0, head - (self._readers[name].cursor if name in self._readers else 0))
        if self.dropped and not self._ended:  # that it is not called any more has been said
            mine = self._thread is threading.current_thread()
            busy = f", and was still busy {PATIENCE:g} s after the end" if self._thread.is_alive() and not mine else ""
            error = TimeoutError(f"it took too long{busy}: it did not get {self.dropped:,} of the records")
            self._fault(_LEFT, error, "they are counted as dropped, and are in the recording all the same")

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
            with self._gate:
                if self._over:
                    return
                batch = reader.poll(_MOST)
                rows = step_rows(batch.slots, reader) if len(batch.slots) else []
                self._left += len(batch.slots) if self._ended else 0
                wanted = bool(rows) and not self._ended
                self.steps += len(rows) if wanted else 0
            if wanted:
                self._call(rows)
            if len(batch.slots) + batch.lost < _MOST:
                break
        if over:
            with self._gate:
                self._done[name] = reader.lost
                del self._readers[name]
            reader.close()

    def _call(self, rows: list[Row]) -> None:
        try:
            given = self._callback(rows)
            what = _not_run(given)
            if what:
                if inspect.iscoroutine(given):
                    given.close()
                with self._gate:
                    self._ended = self._refused = True
                    self.steps -= len(rows)
                    self._left += len(rows)
                raise KvhookError(f"it returned {what}, so that {_NOT_AWAITED}")
        except BaseException as error:
            self._failed(error)

    def _failed(self, error: BaseException) -> None:
        """The user's function has failed. ``sys.exit()`` in it ends what is handed over; this thread goes on, since
        somebody has to count what is not."""
        if isinstance(error, SystemExit):
            with self._gate:
                self._ended = True
            then = "it ended itself with sys.exit(), and is not called again; later steps are counted as dropped"
            self._fault(_CALLBACK, error, then)
        elif self._refused:
            self._fault(_CALLBACK, error, "it is not called again, and all steps are counted as dropped")
        else:
            self._fault(_CALLBACK, error, "it is called again with the next steps")


def check_callback(callback: Any) -> None:
    """Refuse what steps cannot be handed to.

    Raises:
        KvhookError: it cannot be called; or calling it would run nothing of it.
    """
    if isinstance(callback, type):
        raise KvhookError(f"{_TAKES}, not a class ({callback.__qualname__}): give a method of an object of it")
    if not callable(callback):
        raise KvhookError(f"{_TAKES}, not {callback!r}")
    # of an object that can be called it is the method that is looked at
    for what in (callback, type(callback).__call__):
        if inspect.iscoroutinefunction(what):
            raise KvhookError(f"{_TAKES}, not an async one ({callback!r}): {_NOT_AWAITED}")
        if inspect.isgeneratorfunction(what) or inspect.isasyncgenfunction(what):
            raise KvhookError(f"{_TAKES}, not one that yields ({callback!r}): {_NOT_AWAITED}")


def _not_run(given: object) -> str:
    """What a function returned instead of doing its work; "" if it is nothing of the kind."""
    if inspect.isgenerator(given) or inspect.isasyncgen(given):
        return "a generator, which nobody runs"
    # a future, or a task, is run by its loop
    if inspect.isawaitable(given) and not hasattr(given, "_asyncio_future_blocking"):
        return "something to be awaited, which nobody awaits"
    return ""


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
