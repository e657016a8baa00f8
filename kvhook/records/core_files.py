"""The files and rings of engine cores: which belong to a run, and what is left in a ring.

A core has files of its own beside those of the front end, `run.core0-4711.kvh`, because it may run in another process.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvhook.core_schema import BLOCKS_KINDS, CORE_KINDS
from kvhook.errors import KvhookError
from kvhook.records.core import CoreRecords
from kvhook.records.engines import Engines
from kvhook.records.sources import ArraySlots, FileSlots, LaterSlots, SlotSource
from kvhook.ring.place import ring_named
from kvhook.ring.reader import RingReader
from kvhook.ring.trace_file import TRACE_SUFFIX

if TYPE_CHECKING:
    from kvhook.ring.layout import Kinds

#: What the files of engine cores are called by.
STREAMS_OF_CORES = ("core", "blocks")
#: What a trace and its ring have in common.
_WHOSE = ("session", "pid", "engine")
_NAME = re.compile(r"\.(?:core|blocks)(\d{1,9})-(\d{1,10})(?:-(\d{1,9}))?\.kvh$")


def core_files(trace: Path) -> list[Path]:
    """The files of engine cores that belong to a trace of the front end, by their names."""
    return files_of(trace.with_name(trace.name.removesuffix(TRACE_SUFFIX)))


def is_of_core(path: Path) -> bool:
    """Whether a trace file is one of an engine core, by its name."""
    return _NAME.search(path.name) is not None


def files_of(stem: Path) -> list[Path]:
    """The same by the beginning of their names."""
    name = glob.escape(stem.name)
    return sorted(p for stream in STREAMS_OF_CORES for p in stem.parent.glob(f"{name}.{stream}[0-9]*{TRACE_SUFFIX}"))


def open_cores(paths: Iterable[Path], name: str, absent: str = "", session: str = "") -> CoreRecords:
    """Open the files of the engine cores of one run.

    Args:
        paths: the files, in any order; those that are none are left out.
        name: what to call the run.
        absent: why there is none, if there is none.
        session: only files of this recording of this process; "" for all.
    """
    streams: dict[str, dict[tuple[str, str, str], list[FileSlots]]] = {"core": {}, "blocks": {}}
    for path in sorted(paths, key=order_of):
        with contextlib.suppress(KvhookError, OSError):
            file = FileSlots(path)
            meta = file.header.meta if file.header is not None else {}
            stream = meta.get("stream")
            if stream in streams and (not session or is_of_session(meta, session)):
                # where containers share a folder, a process of one may have the number of a process of another
                core = stem_of(path), core_of(path), str(meta.get("session", ""))
                streams[stream].setdefault(core, []).append(file)
    cores = streams["core"]
    ledgers = [streams["blocks"].get(core, []) for core in cores]
    records = CoreRecords(
        [[*files, *_ring(files, CORE_KINDS)] for files in cores.values()],
        name,
        absent,
        [[*files, *_ring(files, BLOCKS_KINDS)] for files in ledgers],
    )
    records.origins = list(cores)
    return records


def open_rings(rings: Iterable[Path], name: str, parent: int) -> CoreRecords:
    """What is left of engine cores in their rings.

    Args:
        rings: rings of engine cores, of whatever process.
        name: what to call the run.
        parent: the process that `kvhook.install` was called in.
    """
    found: list[list[SlotSource]] = []
    for path in rings:
        with contextlib.suppress(KvhookError, OSError), RingReader(path) as reader:
            if reader.header.meta.get("parent") == parent:
                found.append([ArraySlots(reader.now(), reader.header)])
    return CoreRecords(found, name)


def _ring(files: list[FileSlots], kinds: Kinds) -> list[SlotSource]:
    """What is still in the ring that these files are copied from, if it is there."""
    engines = Engines(kinds=kinds)
    for file in files:
        engines.scan(file)
    return rest_in_ring(engines)


def rest_in_ring(engines: Engines) -> list[SlotSource]:
    """What the ring of a core holds beyond the records that have been taken in, if it is there."""
    facts = next(iter(engines.facts()), {})
    engine = int(facts.get("engine", 0))
    last = engines.last_record(engine)
    path = ring_named(str(facts.get("ring", "")))
    if path is None:
        return []
    try:
        with RingReader(path) as reader:
            if any(reader.header.meta.get(name) != facts.get(name) for name in _WHOSE):
                return []
            return [LaterSlots(ArraySlots(reader.now(), reader.header), {engine: last})]
    except (KvhookError, OSError):
        return []


def is_of_session(header: Mapping[str, Any], session: str) -> bool:
    """Whether a file of an engine core is of this process's recording of that name. A forked child carries out the plan
    of its parent: the core of an engine that it makes in its own process is not the parent's."""
    childs = header.get("own_process") is False and header.get("pid") not in (None, os.getpid())
    return header.get("session") == session and not childs


def core_of(path: Path) -> str:
    """Which core of which process: ``0-4711`` of ``run.core0-4711-2.kvh``."""
    return "-".join(map(str, order_of(path)[:2]))


def stem_of(path: Path) -> str:
    """What the files of all cores of a recording begin with: ``/there/run`` of ``run.core0-4711-2.kvh``."""
    return os.path.join(os.path.realpath(path.parent), _NAME.sub("", path.name))


def order_of(path: Path) -> tuple[int, int, int]:
    """Number of the core, its process, and the how-manieth file it is; by the name."""
    match = _NAME.search(path.name)
    return (int(match[1]), int(match[2]), int(match[3] or 1)) if match else (0, 0, 0)
