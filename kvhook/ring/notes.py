"""What is noted beside a ring: scopes that began and ended, and what labels' codes mean.

A ring has room for records alone, and forgets the oldest. Its notes are a file beside it, ``NAME.ring.notes``: each
line is a JSON list of events (see `kvhook.records.events`). They are appended when a scope begins or ends, never in a
step.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

NOTES_SUFFIX = ".notes"
#: A file that has grown beyond this begins anew with what is known at that moment.
MOST_BYTES = 1 << 20
#: No more than this is read: a file that somebody else made may be of any size.
_MOST_READ = 8 << 20
#: Events that are noted; others belong to engine cores.
_NOTED = ("scope", "end", "name")


def notes_of(ring: Path) -> Path:
    """The file with the notes of a ring."""
    return ring.with_name(ring.name + NOTES_SUFFIX)


class RingNotes:
    """Notes events beside rings. A ring whose notes cannot be written goes without: nothing is raised."""

    def __init__(self) -> None:
        self._files: list[Path] = []

    def begin(self, ring: Path, everything: Sequence[list[Any]]) -> None:
        """A ring was made: note what is known so far, and from now on what comes."""
        path = notes_of(ring)
        if self._append(path, everything):
            self._files.append(path)

    def take(self, events: Sequence[list[Any]], everything: Callable[[], Sequence[list[Any]]]) -> None:
        """Note events.

        Args:
            events: those that have come.
            everything: gives what a file begins with that has become too long.
        """
        for path in list(self._files):
            with contextlib.suppress(OSError):
                if os.stat(path).st_size > MOST_BYTES:
                    path.unlink()
                    self._append(path, everything())
                    continue
            if not self._append(path, events):
                self._files.remove(path)

    @staticmethod
    def _append(path: Path, events: Sequence[list[Any]]) -> bool:
        noted = [event for event in events if event[0] in _NOTED]
        if not noted:
            return True
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(path, flags, 0o600)
            try:
                os.write(fd, json.dumps(noted).encode() + b"\n")
            finally:
                os.close(fd)
        except (OSError, ValueError, TypeError):
            return False
        return True


def read_notes(ring: Path) -> list[list[Any]]:
    """The events beside a ring; none if there are none, or they cannot be read."""
    out: list[list[Any]] = []
    try:
        fd = os.open(notes_of(ring), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return []
            lines = file.read(_MOST_READ).split(b"\n")
    except (OSError, ValueError):
        return []
    for line in lines:
        # the last line may be one that is just being written
        with contextlib.suppress(ValueError, RecursionError):
            events = json.loads(line)
            out += events if isinstance(events, list) else []
    return out
