"""The trace files of a spool: which one is written to, and what goes when a bounded history is full."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from kvhook.ring.layout import Layout
from kvhook.ring.trace_file import TraceWriter

#: A limited history is cut into so many files. The oldest is deleted when the limit is reached.
SEGMENTS = 8


class Segments:
    """Files that come one after the other.

    Args:
        new_paths: returns the paths that the next file may have, of which the first that is free is taken; called with
            its number, from 0.
        limit: bytes on disk, above which the oldest part is dropped; None for no limit.
    """

    def __init__(self, new_paths: Callable[[int], Iterable[Path]], limit: int | None) -> None:
        self._new_paths, self._limit = new_paths, limit
        #: oldest first
        self.files: list[TraceWriter] = []
        self._made = 0

    def current(self, layout: Layout) -> TraceWriter | None:
        """The file that takes slots of this layout; None if it is time for a new one."""
        current = next((f for f in reversed(self.files) if f.layout == layout), None)
        if current is None or self._limit is None or current.size < self._limit // SEGMENTS:
            return current
        while sum(f.size for f in self.files) > self._limit - self._limit // SEGMENTS:
            oldest = self.files.pop(0)
            with contextlib.suppress(OSError):
                oldest.close()
            oldest.path.unlink(missing_ok=True)
        return None

    def begin(self, layout: Layout, meta: dict[str, Any]) -> TraceWriter:
        """The next file, under the first of its names that no other process has taken.

        Raises:
            OSError: it cannot be made.
        """
        taken: FileExistsError | None = None
        for path in self._new_paths(self._made):
            try:
                file = TraceWriter(path, layout, meta)
            except FileExistsError as error:
                taken = error
            else:
                self._made += 1
                self.files.append(file)
                return file
        raise taken or FileNotFoundError("there is no name for the next file")

    def newest(self) -> list[TraceWriter]:
        """The files that are written to: of each layout the last."""
        found: list[TraceWriter] = []
        for file in reversed(self.files):
            if not any(file.layout == other.layout for other in found):
                found.append(file)
        return found

    def descriptors(self) -> list[int]:
        """A descriptor of each, for somebody who wants to read them.

        Raises:
            OSError: a file is no longer there.
        """
        opened: list[int] = []
        try:
            for file in self.files:
                opened.append(file.descriptor())
        except OSError:
            for fd in opened:
                os.close(fd)
            raise
        return opened
