"""What a program that was started by ``kvhook run`` has recorded."""

from __future__ import annotations

import contextlib
import glob
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from kvhook.discovery.recovery import recover
from kvhook.discovery.rings import Ring, look_at
from kvhook.errors import KvhookError
from kvhook.recording.launched import LaunchedRun
from kvhook.records.core_files import is_of_core
from kvhook.records.whose import may_be_beside
from kvhook.ring.directory import ring_files
from kvhook.ring.layout import CLOSED
from kvhook.ring.reader import writer_alive
from kvhook.ring.trace_file import TRACE_SUFFIX, header_of

#: Seconds in which an engine core may come to its end after the program that made it was killed.
PATIENCE = 3.0


class Recorded(NamedTuple):
    """A trace, the process that wrote it, whether that still runs, and how many records its rings had to add."""

    path: Path
    pid: int
    runs: bool
    added: int


def traces_of(launched: LaunchedRun, trace: Path) -> list[Path]:
    """The traces that a program and its children have begun: that which was asked for, then the first one first.

    Args:
        launched: the command that started the program.
        trace: the file that was asked for, or the folder. It is looked at as well: where processes run on several
            machines, or in containers, some cannot tell into which files they record.
    """
    if trace.suffix == TRACE_SUFFIX and not trace.is_dir():
        found: Iterable[Path] = trace.parent.glob(f"{glob.escape(trace.stem)}*{TRACE_SUFFIX}")
    else:
        found = trace.glob(f"*{TRACE_SUFFIX}")
    mine: dict[tuple[int, int], tuple[bool, int, Path]] = {}  # a file may have several names
    for path in (*found, *launched.told()):
        with contextlib.suppress(OSError, KvhookError):
            header, info = header_of(path), path.stat()
            if launched.owns(header) and not header.capacity and not is_of_core(path):
                mine.setdefault((info.st_dev, info.st_ino), (path != trace, header.realtime_ns, path))
    return [path for _, _, path in sorted(mine.values())]


def rings_of(launched: LaunchedRun, places: Iterable[Path]) -> list[Ring]:
    """The rings that a program and its children have made, the first one first.

    Args:
        launched: the command that started the program.
        places: directories of rings.
    """
    found = []
    for path in ring_files(places):
        with contextlib.suppress(OSError, KvhookError):
            header = header_of(path, follow_links=False)
            if header.capacity and launched.owns(header):
                found.append((header.realtime_ns, path))
    return [look_at(path) for _, path in sorted(found)]


def completed(trace: Path, places: Iterable[Path]) -> Recorded:
    """Complete a trace, and the files of its engine cores, with what the rings of killed processes still hold."""
    places = list(places)
    header = header_of(trace)
    added = 0
    for path in (trace, *may_be_beside(trace)):
        with contextlib.suppress(OSError, KvhookError):
            if header_of(path).state == CLOSED:
                continue
            if path != trace:
                _await_end(path)
            done = recover(path, places)
            added += sum(done.added.values()) if path == trace else 0
    return Recorded(trace, header.pid, header.state != CLOSED and writer_alive(header), added)


def _await_end(path: Path) -> None:
    """Wait a moment for the end of the process that writes a file."""
    until = time.monotonic() + PATIENCE
    while header_of(path).state != CLOSED and writer_alive(header_of(path)) and time.monotonic() < until:
        time.sleep(0.05)
