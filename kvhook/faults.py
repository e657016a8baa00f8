"""kvhook's own failures: counted, logged once for each place, and told by `kvhook.Session.health`.

kvhook works inside somebody else's engine. A *seam* is a place at which it does so, and its name says what kvhook does
there. An error at a seam ends there. What belongs to the user goes on, see `is_users`.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import os
import signal
from collections.abc import Callable, Iterable, Mapping
from types import CodeType, FrameType
from typing import Any

log = logging.getLogger("kvhook")

#: Ctrl-C and ``sys.exit()`` are meant for the user's program, also where they come while kvhook works. So is what a
#: signal handler raises, of whatever class it is: see `is_users`.
USERS = (KeyboardInterrupt, SystemExit)

#: Seam -> after so many errors it is switched off. One of 1 is switched off for the engine at which it failed, the
#: others for the whole session. What is not here is not in the way of any engine: it happens when an engine is made or
#: gone, or in a thread of kvhook's, and is tried again each time.
LIMITS: Mapping[str, int] = {
    "recording a step": 1,
    "taking over the stats of a step": 1,
    "counting what a step gave": 1,
    "publishing what came after the last step": 1,
    "counting inside the engine core": 1,
    "measuring what vLLM's stats take": 1,
    "reading the free blocks of a schedule": 100,
    "reading a request's time to first token": 100,
    "noting a request's label": 100,
    "noting a call of LLM": 100,
    "noting the end of a call of LLM": 100,
}

#: Seams without which an engine is not recorded: an error there is the reason if there are no steps.
NEEDED = (
    *("patching vLLM", "looking at a new engine", "starting to record an engine", "turning vLLM's stats on"),
    *("turning the engine core's stats on", "recording a step", "taking over the stats of a step"),
    "counting what a step gave",
)

_MOST_TEXT = 500
#: The package's folder.
_HERE = os.path.join(os.path.dirname(__file__), "")


def is_users(error: BaseException) -> bool:
    """Whether an error is the user's, and not one of kvhook's: Ctrl-C, ``sys.exit()``, and what a signal handler has
    raised, a time limit for instance, which may come between any two instructions. Looks at the error's traceback, and
    so takes too long for anything but an error.

    It does not know what a signal handler raises that is not written in Python, nor what one thread raises in another.

    Raises:
        Exception: what a signal handler has raised meanwhile.
    """
    if isinstance(error, USERS):
        return True
    try:
        return _raised_by_handler(error)
    except (MemoryError, RecursionError):
        return False
    except Exception as other:
        if is_users(other):
            raise
        return False  # somebody's handler is an object that cannot be looked at


def _raised_by_handler(error: BaseException) -> bool:
    handlers = None
    at = error.__traceback__
    while at is not None:
        frame, at = at.tb_frame, at.tb_next
        # kvhook's own functions handle no signals. To look at their variables would keep these, the error among them,
        # and with it the engine, until the next full collection
        if not frame.f_code.co_filename.startswith(_HERE) and _is_told_of_its_caller(frame):
            return True
        if handlers is None:
            handlers = {_code_of(signal.getsignal(number)) for number in signal.valid_signals()}
        if frame.f_code in handlers:  # it has changed its own arguments
            return True
    return False


def _is_told_of_its_caller(frame: FrameType) -> bool:
    """Whether a function was called as Python calls signal handlers: with a number, and the very frame that calls."""
    code, given = frame.f_code, frame.f_locals
    arguments = [given.get(name) for name in code.co_varnames[: code.co_argcount]]
    if code.co_flags & inspect.CO_VARARGS:
        rest = given.get(code.co_varnames[code.co_argcount + code.co_kwonlyargcount])
        arguments += rest if isinstance(rest, tuple) else ()
    caller = frame.f_back
    return caller is not None and any(type(n) is int and f is caller for n, f in itertools.pairwise(arguments))


def _code_of(handler: Any) -> CodeType | None:
    while hasattr(handler, "func"):  # functools.partial
        handler = handler.func
    for found in (handler, getattr(type(handler), "__call__", None)):  # noqa: B004 (not whether it can be called)
        if isinstance(code := getattr(found, "__code__", None), CodeType):  # also a bound method's
            return code
    return None


def pass_on(error: BaseException) -> None:
    """Raise an error that is the user's: for whoever has caught one and is about to count it as kvhook's."""
    if is_users(error):
        raise error


class Faults:
    """Counts what went wrong inside kvhook and reports each place once.

    Nothing in here raises but what is the user's: it runs inside somebody else's engine.
    """

    def __init__(self) -> None:
        #: Place -> how often it failed.
        self.counts: dict[str, int] = {}
        #: Place -> the first error there, as one line.
        self.first_errors: dict[str, str] = {}
        #: Place -> the last error there, as one line.
        self.last_errors: dict[str, str] = {}
        #: Place -> what happens after an error there.
        self.then: dict[str, str] = {}

    def fault(self, where: str, error: BaseException, then: str) -> bool:
        """Count an error.

        Args:
            where: the place, in words a user understands.
            error: what was raised there.
            then: what kvhook does about it, in words that end a sentence.

        Returns:
            Whether this is the first error there.

        Raises:
            Exception: this very error, if a signal handler of the user's raised it. It is not counted then.
        """
        if not isinstance(error, USERS):  # whoever hands over one of those has ended it: sys.exit() in a thread
            pass_on(error)
        first = where not in self.counts
        self.counts[where] = self.counts.get(where, 0) + 1
        try:
            what = described(error)
            self.last_errors[where] = what
            if where in self.first_errors:
                return first
            self.first_errors[where], self.then[where] = what, then
            log.warning("kvhook: %s failed: %s%s. The engine is not affected; %s.", where, what, _place(error), then)
        except USERS:
            raise
        except BaseException:  # no stack left, no memory left, or a log handler of somebody's that raises
            self.last_errors.setdefault(where, type(error).__name__)
            self.first_errors.setdefault(where, type(error).__name__)
            self.then.setdefault(where, then)
        return first

    def first_of(self, seams: Iterable[str]) -> str:
        """The first error at one of these places, as a reason; "" if there was none."""
        where = next((each for each in self.first_errors if each in seams), "")
        return (
            where
            and f"{where} failed ({self.first_errors[where]}); kvhook doctor says whether this vLLM can be recorded"
        )

    def is_off(self, where: str) -> bool:
        """Whether a seam has failed so often that it is switched off."""
        return where in self.counts and self.counts[where] >= LIMITS.get(where, 1 << 62)


class contained:
    """``with contained(failed): ...``: an error that is raised inside ends there, and ``failed(error)`` is called. For
    what does not run in every step; it takes 0.2 us."""

    __slots__ = ("_failed",)

    def __init__(self, failed: Callable[[BaseException], None]) -> None:
        self._failed = failed

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if error is None or is_users(error):
            return False
        self._failed(error)
        return True


def described(error: BaseException) -> str:
    """An error as one line. Raises nothing but what has no room left to be said."""
    name = type(error).__name__
    try:
        text = " ".join(str(error).split())
    except USERS:
        raise
    except BaseException:  # its own __str__ fails
        return f"{name} (which cannot be printed)"
    return f"{name}: {text[:_MOST_TEXT]}"


def _place(error: BaseException) -> str:
    """Where an error was raised."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return ""
    return f" ({last.tb_frame.f_code.co_filename}:{last.tb_lineno})"
