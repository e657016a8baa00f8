"""The engine cores of a run so far, added up file by file, so that an answer costs the same however long the run is."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from kvhook.analysis.core_report import CoreReport, report_of
from kvhook.analysis.core_totals import CoreTotals
from kvhook.core_schema import CORE_KINDS
from kvhook.errors import KvhookError
from kvhook.recording.running import CHUNK_BYTES
from kvhook.records.core_files import core_of, is_of_session, order_of, rest_in_ring
from kvhook.records.engines import Engines
from kvhook.records.sources import FileSlots, usable


class RunningCores:
    """Adds up the files of a session's engine cores, whatever process they are in. Any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begin()

    def _begin(self) -> None:
        self._totals = CoreTotals(runs=True)
        #: file -> its slots, and how many of them have been taken in
        self._files: dict[Path, tuple[FileSlots, int]] = {}
        #: core -> what is known of it; a core is called as `core_of` says
        self._cores: dict[str, Engines] = {}

    def account(self, paths: Iterable[Path], session: str) -> CoreReport | None:
        """All cores so far; None if there is none.

        Args:
            paths: their files so far, and perhaps others.
            session: only files of this recording.
        """
        with self._lock, np.errstate(all="ignore"):
            there = sorted(paths, key=order_of)
            if self._files.keys() - set(there):
                self._begin()  # some have fallen out of a bounded history: they do not count any more
            for path in there:
                self._take(path, session)
            totals, cores = self._totals, []
            for number, engines in enumerate(self._cores.values()):
                known = engines
                for rest in rest_in_ring(engines):
                    known = Engines(kinds=CORE_KINDS)
                    known.add(engines)
                    known.scan(rest)
                    if totals is self._totals:
                        totals = totals.copy()
                    for slots in rest.chunks():
                        totals.take(number, slots[usable(slots, CORE_KINDS)], rest.layout, _block_size(known))
                cores.append(known)
            if not cores:
                return None
            facts = [next(iter(core.facts()), {}) for core in cores]
            return report_of(totals, facts, sum(sum(core.lost_and_dropped()) for core in cores))

    def _take(self, path: Path, session: str) -> None:
        """Take in what has been written to a file since."""
        if path not in self._files:
            with contextlib.suppress(KvhookError, OSError):
                file = FileSlots(path)
                meta = file.header.meta if file.header is not None else {}
                if meta.get("stream") == "core" and is_of_session(meta, session):
                    self._files[path] = file, 0
                    self._cores.setdefault(core_of(path), Engines(kinds=CORE_KINDS)).begin(file)
            if path not in self._files:
                return
        file, taken = self._files[path]
        file.refresh()
        engines = self._cores[core_of(path)]
        number = list(self._cores).index(core_of(path))
        for slots in file.chunks(taken, CHUNK_BYTES):
            taken += len(slots)
            self._totals.take(number, engines.take(slots), file.layout, _block_size(engines))
        self._files[path] = file, taken


def _block_size(engines: Engines) -> int:
    return int(next(iter(engines.facts()), {}).get("block_size") or 0)
