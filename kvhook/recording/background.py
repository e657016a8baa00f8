"""A thread of kvhook's own that may fail to start: then it is tried again, and nobody waits for its end."""

from __future__ import annotations

import threading
from collections.abc import Callable

from kvhook.faults import USERS


class Background:
    """Runs a function in a daemon thread, as soon as there is a thread to be had.

    Args:
        run: the function; it returns soon after `wait` has given True.
        name: of the thread.
        failed: is told why the thread could not be started. It may be called several times.
    """

    def __init__(self, run: Callable[[], None], name: str, failed: Callable[[BaseException], None]) -> None:
        self._run, self._name, self._failed = run, name, failed
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()

    def begin(self) -> None:
        """Start the thread, unless it runs or has ended. Two threads may not call this at the same time."""
        if self._thread is not None or self._ended.is_set():
            return
        thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        try:
            thread.start()
        except USERS:
            if thread.ident is not None:  # it runs; only the wait for it was interrupted
                self._thread = thread
            raise
        except BaseException as error:
            self._failed(error)
        else:
            self._thread = thread

    def wait(self, seconds: float) -> bool:
        """Sleep; True if the thread is to end, which also ends the sleep."""
        return self._ended.wait(seconds)

    def leave(self) -> None:
        """Have the thread end, and wait for nothing. It is not started again."""
        self._ended.set()

    def end(self) -> None:
        """Have the thread end, and wait for that, unless this is it. It is not started again."""
        self.leave()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
            self._thread = None
