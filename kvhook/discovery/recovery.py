"""A trace whose process was killed, completed with what only the ring still holds."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kvhook.discovery.rings import find_rings
from kvhook.errors import KvhookError
from kvhook.files import written_beside
from kvhook.ring.layout import CLOSED, Header
from kvhook.ring.reader import RingReader, writer_alive
from kvhook.ring.slots import slot_head
from kvhook.ring.trace_file import header_of, pack_meta, trace_header
from kvhook.trace import Trace, open_trace

if TYPE_CHECKING:
    from kvhook.ring.slots import Slots


class Recovered(NamedTuple):
    """What `recover` did: engine -> records that were added, and those that neither file nor ring had."""

    path: Path
    added: dict[int, int]
    missing: dict[int, int]
    #: why there was nothing to do, if that is so
    reason: str = ""


def recover(path: Path, places: Iterable[Path], out: Path | None = None) -> Recovered:
    """Complete a trace from the rings of the process that wrote it.

    The file is written anew beside the old one and takes its place when it is whole; or it goes to `out`.

    Args:
        path: the trace.
        places: directories of rings.
        out: leave the trace alone and write here; must not exist.

    Raises:
        KvhookError: it is no trace, its process still runs, or it cannot be written.
    """
    trace = open_trace(path)
    header = header_of(path)
    if header.capacity:
        raise KvhookError(f"{path} is a ring, not a trace; kvhook export {path} out.kvh makes a trace of it")
    if header.compressed:
        return Recovered(path, {}, {}, "it is complete: only traces that were closed are compressed")
    if out is not None and out.exists():
        raise KvhookError(f"{out} exists; take another name or remove it")
    if header.state == CLOSED and not any(
        trace.engines.count(e["engine"], "records_unwritten") for e in trace.meta["engines"]
    ):
        return Recovered(path, {}, {}, "it is complete: it was closed")
    if writer_alive(header):
        raise KvhookError(
            f"process {header.pid} still runs and writes {path}; it completes it itself when it comes to its end"
        )
    rings = list(_rings_of(header, places))
    if not rings:
        return Recovered(path, {}, {}, f"process {header.pid} has left no ring, so there is nothing to add")
    pieces = [piece for ring, slots in rings if (piece := _new(trace, ring, slots)) is not None]
    target = out or path
    try:
        _write(path, header, pieces, target)
    except OSError as error:
        raise KvhookError(f"cannot write {target}: {error.strerror or error}; {path} is as it was") from None
    return Recovered(
        target, {p.engine: len(p.slots) for p in pieces}, {p.engine: p.missing for p in pieces if p.missing}
    )


class _Piece(NamedTuple):
    """What is to be appended for one engine."""

    engine: int
    facts: dict[str, object]
    slots: Slots
    missing: int


def _rings_of(header: Header, places: Iterable[Path]) -> Iterator[tuple[Header, Slots]]:
    """The rings of the process that wrote a trace, with what they hold."""
    for found in find_rings(places):
        with contextlib.suppress(KvhookError, OSError), RingReader(found.path) as reader:
            ring = reader.header
            same = (ring.pid, ring.process_start) == (header.pid, header.process_start)
            # engines whose columns differ went to another file of the same run
            if same and ring.layout == header.layout:
                yield ring, reader.remains()


def _new(trace: Trace, ring: Header, slots: Slots) -> _Piece | None:
    """The records of a ring that a trace has not."""
    engine = int(ring.meta.get("engine") or 0)
    last = trace.engines.last_record(engine)
    numbers = slot_head(slots)["n"]
    new = slots[numbers > last]
    published = max(last, int(numbers.max(initial=-1))) + 1
    missing = int(slot_head(new)["n"][0]) - last - 1 if len(new) else 0
    known = any(e["engine"] == engine and e.get("kvhook") for e in trace.meta["engines"])
    facts = {} if known else dict(ring.meta)
    counts = {
        "records_published": published,
        "records_overrun": trace.engines.count(engine, "records_overrun") + missing,
    }
    return _Piece(engine, facts | counts | {"recovered": len(new)}, new, missing)


def _write(path: Path, header: Header, pieces: list[_Piece], target: Path) -> None:
    slot = header.layout.slot_bytes
    with open(path, "rb") as old, written_beside(private=True) as (opener, _):
        size = os.fstat(old.fileno()).st_size
        facts = {name: value for name, value in header.meta.items() if name in ("kvhook", "vllm", "pid_namespace")}
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
