"""A trace whose process was killed, completed with what only the ring still holds."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kvhook.core_schema import BLOCKS_KINDS, CORE_KINDS
from kvhook.errors import KvhookError
from kvhook.files import written_beside
from kvhook.records.engines import Engines
from kvhook.records.left import Piece, left_in_rings
from kvhook.records.sources import FileSlots
from kvhook.ring.layout import CLOSED, Header
from kvhook.ring.place import open_regular
from kvhook.ring.reader import writer_alive
from kvhook.ring.trace_file import header_of, trace_header
from kvhook.schema import KINDS
from kvhook.trace import open_files, open_trace

if TYPE_CHECKING:
    from kvhook.ring.layout import Kinds


#: Facts in the header of a file, which the new one takes over.
_OF_CORES = ("stream", "engine", "pid", "own_process")
_HEADER_FACTS = ("kvhook", "rings", "vllm", "pid_namespace", "session", "kvhook_runs", *_OF_CORES)
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
    pieces = left_in_rings(header, lambda: engines, places)
    if pieces is None:
        return Recovered(path, {}, {}, f"process {header.pid} has left no ring, so there is nothing to add")
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
    """What a file tells of its engines, or its engine cores, without what is left in a ring."""
    if not path.is_file():
        open_trace(path)  # which says what is wrong with it
    header = header_of(path)
    if header.capacity:
        raise KvhookError(f"{path} is a ring, not a trace; kvhook export {path} out.kvh makes a trace of it")
    stream = header.meta.get("stream")
    if not stream:
        return open_files([path], str(path)).engines, header
    engines = Engines(kinds=_KINDS.get(stream, KINDS))
    engines.scan(FileSlots(path))
    return engines, header


def _write(path: Path, header: Header, pieces: list[Piece], target: Path) -> None:
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
            new.write(piece.as_slots(header.layout).tobytes())
