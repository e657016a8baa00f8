"""The run so far, added up file by file while the spool writes, so that an answer costs the same however long it is.

Nothing is done in a step. The spool's thread takes in what has come since, some thousands of records at a time, and
whoever asks takes in the rest.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from kvhook.analysis.core_report import CoreReport
from kvhook.analysis.summarize import summary_of
from kvhook.analysis.summary import LeftOut
from kvhook.analysis.totals import Totals
from kvhook.recording.measured import Measured
from kvhook.records.engines import Engines
from kvhook.records.part import Interval
from kvhook.records.selection import warmups
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

    def __init__(self, path: Path, fd: int, warmups: Callable[[], Sequence[Interval]]) -> None:
        self.source = FileSlots(path, fd)
        self.engines = Engines()
        self.engines.begin(self.source)
        self.totals = Totals(runs=True)
        self.measured = Measured(self.totals, warmups)
        self._taken = 0

    def take(self) -> None:
        """Take in what has been written since."""
        self.source.refresh()
        for slots in self.source.chunks(self._taken, CHUNK_BYTES):
            self._taken += len(slots)
            with np.errstate(all="ignore"):
                usable = self.engines.take(slots)
                self.measured.take(usable, self.source.layout)
                self.totals.take(usable, self.source.layout)


class SoFar(NamedTuple):
    """A run so far. It is only valid inside the function that is given it."""

    totals: Totals
    run: Records
    #: the totals without warm-up, and how many steps are left out
    measured: Totals
    left_out: int


def summary_so_far(
    so_far: SoFar, engine: int | None, core: CoreReport | None = None, *, warmup: bool = False
) -> PrintedSummary | None:
    """The summary of a run so far; None if only reading it can give one."""
    if warmup or not so_far.left_out:
        totals, left_out = so_far.totals, None
    else:
        names = tuple(dict.fromkeys(scope.path for scope in warmups(so_far.run.scopes)))
        totals, left_out = so_far.measured, LeftOut(so_far.left_out, names)
    if not totals.exact:
        return None
    return printed(dataclasses.replace(summary_of(totals, so_far.run, engine, core), left_out=left_out))


class Running:
    """Adds up a session's trace files. Any thread may use it.

    Args:
        opened: gives the files that there are at the moment; see `Opened`.
        warmups: gives from when to when the session was warming up so far.
    """

    def __init__(self, opened: Callable[[], Opened], warmups: Callable[[], Sequence[Interval]] = list) -> None:
        self._opened, self._warmups = opened, warmups
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
                totals, measured = files[0].totals, files[0].measured.totals
            else:
                totals, measured = Totals(), Totals()
                for file in files:
                    totals.add(file.totals)
                    measured.add(file.measured.totals)
            run = Records([file.source for file in files], name, more, counts, engines=engines)
            left_out = sum(file.measured.left_out for file in files)
            return question(SoFar(totals, run, measured, left_out))

    def _take(self) -> dict[int, dict[str, int]]:
        paths, opened, counts = self._opened()
        files = {}
        for path, fd in zip(paths, opened, strict=True):
            if path in self._files:
                os.close(fd)
                files[path] = self._files[path]
            else:
                files[path] = _File(path, fd, self._warmups)
            files[path].take()
        self._files = files  # those that have fallen out of a bounded history are forgotten
        return counts
