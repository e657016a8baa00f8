"""Watching all engines of this user, or of some processes, while they come, work and go. Only reads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from kvhook.analysis.live import COLUMNS, Live, View
from kvhook.discovery.ancestry import Family
from kvhook.discovery.rings import ALIVE, Ring, glance
from kvhook.errors import KvhookError
from kvhook.records.core import CoreRecords
from kvhook.records.events import open_scope
from kvhook.records.sources import ArraySlots
from kvhook.ring.directory import ring_files
from kvhook.ring.notes import read_notes
from kvhook.ring.reader import RingReader, writer_alive
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


class Wanted(Protocol):
    """Tells whether a process is to be watched."""

    def __call__(self, process: int, parent: int, elsewhere: bool = False, /) -> bool:
        """Whether it is.

        Args:
            process: its number.
            parent: who its parent was when it began, as its ring says.
            elsewhere: it is in another container, where these numbers mean other processes than here.
        """


def everybody(process: int, parent: int, elsewhere: bool = False, /) -> bool:
    """Every process is wanted."""
    return True


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
        wanted: Wanted = everybody,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._places, self._wanted, self._clock = places, wanted, clock
        self._looked = -1e9
        self._engines: dict[Path, tuple[RingReader, Live]] = {}
        self._cores: dict[Path, RingReader] = {}
        self._front_ends: dict[Path, Live] = {}
        self._ended: list[Live] = []
        self._seen: set[Path] = set()
        #: rings of processes that work and are not wanted, as far as is known
        self._others: dict[Path, tuple[Ring, Header]] = {}

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

    @property
    def others(self) -> list[int]:
        """The processes with engines that work and are not watched."""
        return sorted({ring.pid for ring, header in self._others.values() if not ring.stream and writer_alive(header)})

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
            self._seen.add(ring.path)
            if ring.state == ALIVE:
                self._others[ring.path] = ring, header
        # One that is wanted may tell that another is, too: a core's ring is made before its engine's. So the others are
        # asked about again whenever there is news, with what their headers said when they were read.
        more = bool(looks)
        while more:
            more = False
            for path, (ring, header) in list(self._others.items()):
                if not writer_alive(header):
                    del self._others[path]
                elif self._wanted(ring.pid, _parent_of(ring, header), ring.elsewhere):
                    del self._others[path]
                    self._open(ring, header)
                    more = True

    def _open(self, ring: Ring, header: Header) -> None:
        try:
            reader = RingReader(ring.path)
        except (KvhookError, OSError):
            return
        if ring.stream:
            self._cores[ring.path] = reader
        else:
            self._engines[ring.path] = reader, Live(ring.pid, header.meta)

    def _take(self, reader: RingReader, live: Live, *, final: bool) -> None:
        while True:
            batch = reader.poll(_MOST, final=final)
            live.lost, live.event, live.rest = reader.lost, reader.last_event, reader.rest
            if len(batch.slots):
                trace = from_slots(batch.slots, reader.header, str(reader.path))
                there = {column.name for column in trace.columns("step")}
                steps = trace.steps(columns=[name for name in COLUMNS if name in there])
                requests = None
                if live.lacks_requests and trace.columns("request"):  # level light has none
                    requests = trace.requests(columns=["request", "step"])
                live.take(steps, {series: _single(trace.latencies(series)) for series in VALUE_SERIES}, requests)
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
        headers = [(reader.header, p) for p, reader in self._cores.items()]
        cores = sorted((one.realtime_ns, p) for one, p in headers if _process_of(one) == whose)
        place = cores.index((header.realtime_ns, path))
        return fronts[place][1] if place < len(fronts) else None


def _process_of(core: Header) -> int:
    """The process of the front end of an engine core. A forked child carries out its parent's plan."""
    here = core.meta.get("own_process") is False
    return core.pid if here else int(core.meta.get("parent") or 0)


def _parent_of(ring: Ring, header: Header) -> int:
    """The parent of the process that a ring is of; for an engine core that is the process of its front end."""
    return int(header.meta.get("parent" if ring.stream else "parent_pid") or 0)


def descends_from(pid: int) -> Wanted:
    """Whether a process is this one, or one that it has started, directly or not."""
    family = Family([pid])

    def wanted(process: int, parent: int, elsewhere: bool = False, /) -> bool:
        return not elsewhere and family.has(process, parent)

    return wanted


def one_of(pids: Sequence[int]) -> Wanted:
    """Whether a process is one of these, or one that they have started; all are if there are none."""
    family = Family(pids)

    def wanted(process: int, parent: int, elsewhere: bool = False, /) -> bool:
        if elsewhere:
            return process in pids or parent in pids
        return family.has(process, parent)

    return wanted if pids else everybody


def _single(values: tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]) -> npt.NDArray[np.float64]:
    import numpy as np

    return np.repeat(*values)
