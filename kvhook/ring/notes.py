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
from typing import Any, NamedTuple

from kvhook.ring.place import create_file, open_regular

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


class _Written(NamedTuple):
    """A file with notes that was made here, so that it can be known again."""

    device: int
    inode: int
    size: int

    def is_still(self, info: os.stat_result) -> bool:
        """Whether a file is this one, has no other name, and nobody else has written to it."""
        mine = stat.S_ISREG(info.st_mode) and info.st_uid == os.geteuid() and info.st_nlink == 1
        return mine and self == (info.st_dev, info.st_ino, info.st_size)


class RingNotes:
    """Notes events beside rings. A ring whose notes cannot be written goes without: nothing is raised."""

    def __init__(self) -> None:
        #: the notes that are written; None if there is no file yet
        self._files: dict[Path, _Written | None] = {}

    def begin(self, ring: Path, everything: Sequence[list[Any]]) -> None:
        """A ring was made: note what is known so far, and from now on what comes."""
        self._files[notes_of(ring)] = None
        self._note(notes_of(ring), _line(everything))

    def take(self, events: Sequence[list[Any]], everything: Callable[[], Sequence[list[Any]]]) -> None:
        """Note events.

        Args:
            events: those that have come.
            everything: gives what a file begins with that has become too long.
        """
        line = _line(events)
        for path, written in list(self._files.items()):
            if written is None or written.size <= MOST_BYTES:
                self._note(path, line)
                continue
            with contextlib.suppress(OSError):
                if written.is_still(os.lstat(path)):
                    path.unlink()
                    self._files[path] = None
            self._note(path, line if self._files[path] else _line(everything()))

    def _note(self, path: Path, line: bytes) -> None:
        """Append to a file that was made here, or make it. Somebody else may have put a file, a link or a pipe at its
        name: that is not written to and not waited for, and the ring goes without notes from then on."""
        if not line:
            return
        written = self._files.pop(path)
        flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        try:
            with open(os.open(path, flags) if written else create_file(path), "wb", buffering=0) as file:
                if written is None or written.is_still(os.fstat(file.fileno())):
                    file.write(line)
                    info = os.fstat(file.fileno())
                    self._files[path] = _Written(info.st_dev, info.st_ino, info.st_size)
        except (OSError, ValueError):
            return


def _line(events: Sequence[list[Any]]) -> bytes:
    """Those of the events that are noted, as a line; empty if there are none, or they cannot be written as JSON."""
    noted = [event for event in events if event[0] in _NOTED]
    try:
        return json.dumps(noted).encode() + b"\n" if noted else b""
    except (ValueError, TypeError):
        return b""


def read_notes(ring: Path) -> list[list[Any]]:
    """The events beside a ring; none if there are none, or they cannot be read."""
    out: list[list[Any]] = []
    try:
        with open(open_regular(notes_of(ring), follow_links=False), "rb") as file:
            if os.fstat(file.fileno()).st_uid != os.lstat(ring).st_uid:
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
