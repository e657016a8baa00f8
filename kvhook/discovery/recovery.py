"""A trace whose process was killed, completed with what only the ring still holds."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kvhook.core_schema import BLOCKS_KINDS, CORE_KINDS
from kvhook.discovery.rings import ALL_STREAMS, ring_files
from kvhook.errors import KvhookError
from kvhook.files import written_beside
from kvhook.records.engines import Engines
from kvhook.records.sources import FileSlots
from kvhook.ring.layout import CLOSED, Header
from kvhook.ring.place import open_regular
from kvhook.ring.reader import RingReader, writer_alive
from kvhook.ring.slots import slot_head
from kvhook.ring.trace_file import header_of, pack_meta, trace_header
from kvhook.schema import KINDS
from kvhook.trace import open_trace

if TYPE_CHECKING:
    from kvhook.ring.layout import Kinds
    from kvhook.ring.slots import Slots


#: Facts in the header of a file, which the new one takes over.
_HEADER_FACTS = ("kvhook", "vllm", "pid_namespace", "stream", "session", "engine", "pid", "own_process")
#: What is recorded in a file -> its kinds of records.
_KINDS: dict[str, Kinds] = {"": KINDS, "core": CORE_KINDS, "blocks": BLOCKS_KINDS}


class Recovered(NamedTuple):
    """What `recover` did: engine -> records that were added, and those that neither file nor ring had."""

    path: Path
    added: dict[int, int]
    missing: dict[int, int]
    #: why there was nothing to do, if that is so
    reason: str = ""


def recover(path: Path, places: Iterable[Path], out: Path | None = None) -> Recovered:
    """Complete a trace, or a file that an engine core has written, from the rings of the process that wrote it.

    The file is written anew beside the old one and takes its place when it is whole; or it goes to `out`.

    Args:
        path: the trace.
        places: directories of rings.
        out: leave the trace alone and write here; must not exist.

    Raises:
        KvhookError: it is no trace, its process still runs, or it cannot be written.
    """
    engines, header = _look_at(path)
    if header.compressed:
        return Recovered(path, {}, {}, "it is complete: only traces that were closed are compressed")
    if out is not None and os.path.lexists(out):
        raise KvhookError(f"{out} exists; take another name or remove it")
    if header.state == CLOSED and not any(
        engines.count(int(e["engine"]), "records_unwritten") for e in engines.facts()
    ):
        return Recovered(path, {}, {}, "it is complete: it was closed")
    if writer_alive(header):
        raise KvhookError(
            f"process {header.pid} still runs and writes {path}; it completes it itself when it comes to its end"
        )
    rings = []
    for ring in rings_of(header, places):
        with contextlib.suppress(KvhookError, OSError), RingReader(ring) as reader:
            rings.append((reader.header, reader.remains()))
    if not rings:
        return Recovered(path, {}, {}, f"process {header.pid} has left no ring, so there is nothing to add")
    pieces = [
        piece for ring, slots in _own(rings, header.realtime_ns) if (piece := _new(engines, ring, slots)) is not None
    ]
    # what a link of the user's leads to is completed, and the link stays
    target = out or Path(os.path.realpath(path))
    try:
        _write(path, header, pieces, target)
    except OSError as error:
        raise KvhookError(f"cannot write {target}: {error.strerror or error}; {path} is as it was") from None
    return Recovered(
        target, {p.engine: len(p.slots) for p in pieces}, {p.engine: p.missing for p in pieces if p.missing}
    )


def _look_at(path: Path) -> tuple[Engines, Header]:
    """What a file tells of its engines, or its engine cores."""
    header = header_of(path) if path.is_file() else None
    if header is None or not header.meta.get("stream"):
        trace = open_trace(path)  # which says what is wrong with it, if something is
        header = header_of(path)
        engines = trace.engines
    else:
        engines = Engines(kinds=_KINDS.get(header.meta["stream"], KINDS))
        if not header.capacity:
            engines.scan(FileSlots(path))
    if header.capacity:
        raise KvhookError(f"{path} is a ring, not a trace; kvhook export {path} out.kvh makes a trace of it")
    return engines, header


class _Piece(NamedTuple):
    """What is to be appended for one engine."""

    engine: int
    facts: dict[str, object]
    slots: Slots
    missing: int


def rings_of(header: Header, places: Iterable[Path]) -> Iterator[Path]:
    """The rings of the process that wrote a file, of what is recorded in it.

    Args:
        header: of the file.
        places: directories of rings.
    """
    for path in ring_files(places, ALL_STREAMS):
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


def _new(engines: Engines, ring: Header, slots: Slots) -> _Piece | None:
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
    return _Piece(engine, facts | counts | {"recovered": len(new)}, new, missing)


def _write(path: Path, header: Header, pieces: list[_Piece], target: Path) -> None:
    slot = header.layout.slot_bytes
    with open(open_regular(path), "rb") as old, written_beside(private=True) as (opener, _):
        size = os.fstat(old.fileno()).st_size
        facts = {name: value for name, value in header.meta.items() if name in _HEADER_FACTS}
        new = opener(target)
        new.write(trace_header(header.layout, facts, like=header, closed=True))
        old.seek(header.header_bytes)
        left = (size - header.header_bytes) // slot * slot
        while left and (data := old.read(min(left, 1 << 20))):
            new.write(data)
            left -= len(data)
        for piece in pieces:
            new.write(pack_meta(header.layout, piece.engine, piece.facts).tobytes())
            new.write(piece.slots.tobytes())
