"""The thread that looks at a polled source now and then."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

#: Seconds that the end waits for a sample that is just being taken.
_JOIN = 5.0


class Sampler:
    """Calls a method again and again in a daemon thread, without keeping the method's object alive.

    It ends when `end` is called, when the method gives False, and when its object is dropped.

    Args:
        sample: a bound method; gives whether another sample is needed.
        interval: seconds between two calls.

    Raises:
        RuntimeError: no thread can be started.
    """

    def __init__(self, sample: Callable[[], bool], interval: float) -> None:
        stop = threading.Event()
        method = weakref.WeakMethod(sample)
        self.thread = threading.Thread(
            target=_sample_until, args=(method, stop, interval), name="kvhook-collector", daemon=True
        )
        self.thread.start()
        # also when nobody ends it: at the interpreter's exit, and when the object is dropped
        owner = sample.__self__  # type: ignore[attr-defined]
        self.end: Callable[[], object] = weakref.finalize(owner, _end, stop, self.thread)

    @property
    def is_this_thread(self) -> bool:
        """Whether it is asked from within a sample."""
        return self.thread is threading.current_thread()


def _sample_until(method: weakref.WeakMethod[Callable[[], bool]], stop: threading.Event, interval: float) -> None:
    while not stop.wait(interval):
        sample = method()
        if sample is None or not sample():
            return
        del sample


def _end(stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    if thread is not threading.current_thread():
        thread.join(_JOIN)
