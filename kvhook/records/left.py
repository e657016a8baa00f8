"""What a process that was killed has left in its rings, and its file has not."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvhook.errors import KvhookError
from kvhook.records.engines import Engines
from kvhook.records.imported import SlotsInMemory
from kvhook.records.sources import SlotSource
from kvhook.ring.directory import ALL_STREAMS, directories, ring_files
from kvhook.ring.layout import CLOSED, Header, Layout
from kvhook.ring.reader import RingReader, writer_alive
from kvhook.ring.slots import slot_head
from kvhook.ring.trace_file import header_of, pack_meta

if TYPE_CHECKING:
    from kvhook.ring.slots import Slots


class Piece(NamedTuple):
    """What a file lacks of one engine: records, facts, and how many records neither file nor ring has."""

    engine: int
    facts: dict[str, object]
    slots: Slots
    missing: int

    def as_slots(self, layout: Layout) -> Slots:
        """The facts and the records, as they are appended to a file."""
        return np.concatenate([pack_meta(layout, self.engine, self.facts), self.slots])


def rest_of(header: Header, engines: Callable[[], Engines], path: Path) -> tuple[list[SlotSource], str]:
    """What completes a file whose process was killed, and what people should know of it.

    Args:
        header: of the file.
        engines: gives what the file tells of its engines; asked for only if there is a ring.
        path: the file.

    Returns:
        Slots to be read after the file's, and a sentence; neither if the file is complete or its process still runs.
    """
    if header.state == CLOSED or writer_alive(header):
        return [], ""
    pieces = left_in_rings(header, engines, directories())
    ended = f"process {header.pid} ended without closing {path}"
    if pieces is None:
        return [], f"{ended}, and its ring is not there: the last second of it may be missing"
    left = sum(len(piece.slots) for piece in pieces)
    if not left:
        return [], ""
    rest: list[SlotSource] = [SlotsInMemory(header.layout, each.as_slots(header.layout), header) for each in pieces]
    recover = f"kvhook recover {shlex.quote(str(path))}"
    return rest, f"{ended}; {left:,} of its records are still in its ring: {recover} moves them"


def left_in_rings(header: Header, engines: Callable[[], Engines], places: Iterable[Path]) -> list[Piece] | None:
    """What the rings of the process that wrote a file hold and the file does not, engine by engine.

    Args:
        header: of the file.
        engines: gives what the file tells of its engines; asked for only if there is a ring.
        places: directories of rings.

    Returns:
        The pieces; None if no ring of that process is there.
    """
    rings = []
    for ring in rings_of(header, places):
        with contextlib.suppress(KvhookError, OSError), RingReader(ring) as reader:
            rings.append((reader.header, reader.remains()))
    if not rings:
        return None
    known = engines()
    new = (_new(known, ring, slots) for ring, slots in _own(rings, header.realtime_ns))
    return [piece for piece in new if piece is not None]


def rings_of(header: Header, places: Iterable[Path]) -> Iterator[Path]:
    """The rings of the process that wrote a file, of what is recorded in it.

    Args:
        header: of the file. It says where the rings were made, unless it is anonymous.
        places: directories of rings, besides that one.
    """
    told = header.meta.get("rings")
    found = list(places)
    if isinstance(told, str) and (place := Path(told)).is_absolute() and place not in found:
        found.append(place)
    for path in ring_files(found, ALL_STREAMS):
        with contextlib.suppress(KvhookError, OSError):
            ring = header_of(path, follow_links=False)
            # engines whose columns differ went to another file of the same run
            if _writer(ring) == _writer(header) and ring.layout == header.layout:
                yield path


def _own(rings: list[tuple[Header, Slots]], made_ns: int) -> list[tuple[Header, Slots]]:
    """Of several rings for an engine of one number, that which belongs to a file made at that time.

    A process that became another program (``exec``), or installed kvhook twice, has numbered its engines anew. The ring
    of a session's first engine is made just before its file.
    """
    own: dict[int, tuple[Header, Slots]] = {}
    for ring in sorted(rings, key=lambda ring: ring[0].realtime_ns):
        number = int(ring[0].meta.get("engine") or 0)
        if number not in own or ring[0].realtime_ns <= made_ns:
            own[number] = ring
    return list(own.values())


def _writer(header: Header) -> tuple[object, ...]:
    """Whose a file is: of an engine core, each has files of its own."""
    stream = header.meta.get("stream", "")
    return header.pid, header.process_start, stream, header.meta.get("engine") if stream else None


def _new(engines: Engines, ring: Header, slots: Slots) -> Piece | None:
    """The records of a ring that a trace has not."""
    engine = int(ring.meta.get("engine") or 0)
    last = engines.last_record(engine)
    numbers = slot_head(slots)["n"]
    new = slots[numbers > last]
    published = max(last, int(numbers.max(initial=-1))) + 1
    missing = int(slot_head(new)["n"][0]) - last - 1 if len(new) else 0
    known = any(e["engine"] == engine and e.get("kvhook") for e in engines.facts())
    facts = {} if known else dict(ring.meta)
    counts = {
        "records_published": published,
        "records_overrun": engines.count(engine, "records_overrun") + missing,
    }
    return Piece(engine, facts | counts | {"recovered": len(new)}, new, missing)
