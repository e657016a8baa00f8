"""Watching all engines of this user, or of some processes, while they come, work and go. Only reads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvhook.analysis.live import COLUMNS, Live, View
from kvhook.discovery.rings import ALIVE, glance
from kvhook.errors import KvhookError
from kvhook.records.core import CoreRecords
from kvhook.records.events import open_scope
from kvhook.records.sources import ArraySlots
from kvhook.ring.directory import ring_files
from kvhook.ring.notes import read_notes
from kvhook.ring.reader import RingReader
from kvhook.schema import VALUE_SERIES
from kvhook.trace import from_slots

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from kvhook.ring.layout import Header

#: Seconds between two looks for new rings, and between two looks at whether a writer still runs.
LOOK_EVERY = 0.5
#: Records that are taken of a ring at a time.
_MOST = 8192


class Watch:
    """Every engine that works, and those that have ended while they were watched.

    Args:
        places: gives the directories of rings.
        wanted: whether a process is to be watched.
        clock: seconds; monotonic.
    """

    def __init__(
        self,
        places: Callable[[], Iterable[Path]],
        wanted: Callable[[int, int], bool] = lambda pid, parent: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._places, self._wanted, self._clock = places, wanted, clock
        self._looked = -1e9
        self._engines: dict[Path, tuple[RingReader, Live]] = {}
        self._cores: dict[Path, RingReader] = {}
        self._front_ends: dict[Path, Live] = {}
        self._ended: list[Live] = []
        self._seen: set[Path] = set()

    def refresh(self) -> None:
        """Take in what has come since the last call. What cannot be read is left out; nothing is raised."""
        now = self._clock()
        look = now - self._looked >= LOOK_EVERY
        if look:
            self._looked = now
            self._find()
        for path, (reader, live) in list(self._engines.items()):
            end = "closed" if reader.closed else "dead" if look and not reader.writer_alive else ""
            if look:
                live.scope = open_scope(read_notes(path), live.engine)
            try:
                self._take(reader, live, final=end == "dead")
            except KvhookError:
                end = end or "dead"
            if end:
                live.state = end
                reader.close()
                del self._engines[path]
                self._ended.append(live)
        for path, reader in list(self._cores.items()):
            self._take_core(path, reader, gone=look and (reader.closed or not reader.writer_alive))

    def views(self, window: float, now_ns: int | None = None) -> list[View]:
        """Every engine in numbers: those that work in the order in which they came, and then those that have ended."""
        now_ns = time.monotonic_ns() if now_ns is None else now_ns
        return [live.view(now_ns, window) for live in (*(live for _, live in self._engines.values()), *self._ended)]

    @property
    def works(self) -> bool:
        """Whether any engine works."""
        return bool(self._engines)

    def close(self) -> None:
        """Let go of the rings."""
        for reader in (*(reader for reader, _ in self._engines.values()), *self._cores.values()):
            reader.close()
        self._engines.clear()
        self._cores.clear()

    def _find(self) -> None:
        new = [path for path in ring_files(self._places(), ("", "core")) if path not in self._seen]
        looks = [(ring, header) for ring, header in map(glance, new) if header is not None]  # None: just being made
        for ring, header in sorted(looks, key=lambda look: (look[1].realtime_ns, look[0].path)):
            path = ring.path
            self._seen.add(path)
            parent = int(header.meta.get("parent" if ring.stream else "parent_pid") or 0)
            if ring.state != ALIVE or not self._wanted(ring.pid, parent):
                continue
            try:
                reader = RingReader(path)
            except (KvhookError, OSError):
                continue
            if ring.stream:
                self._cores[path] = reader
            else:
                self._engines[path] = reader, Live(ring.pid, header.meta)

    def _take(self, reader: RingReader, live: Live, *, final: bool) -> None:
        while True:
            batch = reader.poll(_MOST, final=final)
            live.lost, live.event, live.rest = reader.lost, reader.last_event, reader.rest
            if len(batch.slots):
                trace = from_slots(batch.slots, reader.header, str(reader.path))
                there = {column.name for column in trace.columns("step")}
                steps = trace.steps(columns=[name for name in COLUMNS if name in there])
                live.take(steps, {series: _single(trace.latencies(series)) for series in VALUE_SERIES})
            if len(batch.slots) + batch.lost < _MOST:
                return

    def _take_core(self, path: Path, reader: RingReader, *, gone: bool) -> None:
        live = self._front_end_of(path, reader.header)
        try:
            # the core's ring is made first: what is in it is left there until its front end has been found
            if live is not None and len(slots := reader.poll(_MOST).slots):
                live.take_core(CoreRecords([[ArraySlots(slots, reader.header)]], str(path)).steps())
        except KvhookError:
            gone = True
        if gone:
            reader.close()
            del self._cores[path]
            self._front_ends.pop(path, None)

    def _front_end_of(self, path: Path, header: Header) -> Live | None:
        """The engine that a core belongs to. Once it has been found it stays, whichever engines and cores end."""
        if path not in self._front_ends:
            found = self._find_front_end(path, header)
            if found is None:
                return None
            self._front_ends[path] = found
        return self._front_ends[path]

    def _find_front_end(self, path: Path, header: Header) -> Live | None:
        """Of the engines of its process: the one of its rank, else the one at its place in their order."""
        whose = _process_of(header)
        fronts = [(reader.header.meta, live) for reader, live in self._engines.values() if reader.header.pid == whose]
        ranks = {facts.get("engine_index"): live for facts, live in fronts}
        if None not in ranks and len(ranks) == len(fronts) > 1:
            return ranks.get(header.meta.get("data_parallel_rank"))
        cores = [p for p, reader in self._cores.items() if _process_of(reader.header) == whose]
        place = cores.index(path)
        return fronts[place][1] if place < len(fronts) else None


def _process_of(core: Header) -> int:
    """The process of the front end of an engine core. A forked child carries out its parent's plan."""
    here = core.meta.get("own_process") is False
    return core.pid if here else int(core.meta.get("parent") or 0)


def descends_from(pid: int) -> Callable[[int, int], bool]:
    """Whether a process is this one, or one that it has started, told by process and parent."""
    known = {pid}

    def wanted(process: int, parent: int) -> bool:
        if process in known or parent in known:
            known.add(process)
            return True
        return False

    return wanted


def one_of(pids: Sequence[int]) -> Callable[[int, int], bool]:
    """Whether a process is one of these; all are if there are none."""
    return lambda process, parent: not pids or process in pids or parent in pids


def _single(values: tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]) -> npt.NDArray[np.float64]:
    import numpy as np

    return np.repeat(*values)
