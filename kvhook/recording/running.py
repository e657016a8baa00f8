"""The run so far, added up file by file while the spool writes, so that an answer costs the same however long it is.

Nothing is done in a step. The spool's thread takes in what has come since, some thousands of records at a time, and
whoever asks takes in the rest.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from kvhook.analysis.core_report import CoreReport
from kvhook.analysis.summarize import summary_of
from kvhook.analysis.totals import Totals
from kvhook.records.engines import Engines
from kvhook.records.sources import FileSlots
from kvhook.records.tables import Records
from kvhook.text.summary import PrintedSummary, printed

_T = TypeVar("_T")

#: Bytes that are taken in at a time: so few that the engine's process does not become larger by it.
CHUNK_BYTES = 1 << 20

#: What `kvhook.recording.spool.Spool.open` gives: files, descriptors, counts of records.
Opened = tuple[list[Path], list[int], dict[int, dict[str, int]]]


class _File:
    """A trace file, and what has been taken in of it."""

    def __init__(self, path: Path, fd: int) -> None:
        self.source = FileSlots(path, fd)
        self.engines = Engines()
        self.engines.begin(self.source)
        self.totals = Totals(runs=True)
        self._taken = 0

    def take(self) -> None:
        """Take in what has been written since."""
        self.source.refresh()
        for slots in self.source.chunks(self._taken, CHUNK_BYTES):
            self._taken += len(slots)
            with np.errstate(all="ignore"):
                self.totals.take(self.engines.take(slots), self.source.layout)


class SoFar(NamedTuple):
    """A run so far. It is only valid inside the function that is given it."""

    totals: Totals
    run: Records


def summary_so_far(so_far: SoFar, engine: int | None, core: CoreReport | None = None) -> PrintedSummary | None:
    """The summary of a run so far; None if only reading it can give one."""
    return printed(summary_of(so_far.totals, so_far.run, engine, core)) if so_far.totals.exact else None


class Running:
    """Adds up a session's trace files. Any thread may use it.

    Args:
        opened: gives the files that there are at the moment; see `Opened`.
    """

    def __init__(self, opened: Callable[[], Opened]) -> None:
        self._opened = opened
        self._lock = threading.Lock()
        self._files: dict[Path, _File] = {}

    def keep_up(self) -> None:
        """Take in what has come since."""
        with self._lock:
            self._take()

    def ask(self, question: Callable[[SoFar], _T], name: str, more: Mapping[str, Any]) -> _T:
        """Answer a question about the run so far.

        Args:
            question: is given the run.
            name: what to call it.
            more: see `kvhook.records.run.Run`.
        """
        with self._lock:
            counts = self._take()
            files = list(self._files.values())
            engines = Engines()
            for file in files:
                engines.add(file.engines)
            if len(files) == 1:
                totals = files[0].totals
            else:
                totals = Totals()
                for file in files:
                    totals.add(file.totals)
            run = Records([file.source for file in files], name, more, counts, engines=engines)
            return question(SoFar(totals, run))

    def _take(self) -> dict[int, dict[str, int]]:
        paths, opened, counts = self._opened()
        files = {}
        for path, fd in zip(paths, opened, strict=True):
            if path in self._files:
                os.close(fd)
                files[path] = self._files[path]
            else:
                files[path] = _File(path, fd)
            files[path].take()
        self._files = files  # those that have fallen out of a bounded history are forgotten
        return counts
