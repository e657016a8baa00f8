"""Standard output and error as they may be: closed, on a full disk, or a pipe whose reader has gone."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TextIO


def open_closed() -> None:
    """Let what is written to a stream that was closed before this process began (``>&-``) go nowhere. Python has None
    in its place, and ``print`` then takes standard output for standard error."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            # not inherited: a program that is started finds it closed, as it would have done without kvhook
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8", errors="replace"))  # noqa: SIM115


def say(text: str) -> None:
    """Print a text to standard error, if that can be written. It never raises, and leaves nothing behind that Python
    would fail to write at its end, which makes an exit code of 120."""
    stream = sys.stderr
    if stream is None:
        return
    try:
        print(text, file=stream, flush=True)
    except (OSError, ValueError):
        discard(stream)


def settle() -> OSError | None:
    """Write what is still to be written, and drop what cannot be written any more.

    Returns:
        Why standard output could not be written, unless it is a pipe whose reader has gone.
    """
    why = None
    for stream in (sys.stderr, sys.stdout):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError) as error:
            discard(stream)
            if stream is sys.stdout and isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
                why = error
    return why


def discard(stream: TextIO) -> None:
    """Empty the buffer of a stream that cannot be written."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        number = stream.fileno()
        kept = os.dup(number)
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.dup2(nowhere, number, os.get_inheritable(number))
            stream.flush()
        finally:
            os.dup2(kept, number, os.get_inheritable(number))
            os.close(kept)
            os.close(nowhere)
