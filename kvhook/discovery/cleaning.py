"""Keeping what ended processes leave behind within bounds, and removing it: rings, and temporary histories.

What belongs to a process that still runs is never touched.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from kvhook.discovery.rings import ALIVE, OLD, find_rings, glance, is_elsewhere
from kvhook.errors import KvhookError
from kvhook.ring.directory import ALL_STREAMS, FRONT_ENDS, entries, info_of, is_ours, remove_path, ring_files
from kvhook.ring.place import is_alive, pid_namespace, process_start
from kvhook.ring.trace_file import header_of

#: Rings of ended processes and closed rings that are kept, and their bytes together; also no more than this share of
#: the file system: in containers /dev/shm is often 64 MiB in all.
MOST_RINGS = 16
MOST_BYTES = 64 << 20
MOST_SHARE = 1 / 8

HISTORY_PREFIX = "kvhook-history-"
_OF_CORES = re.compile(r"-core[0-9a-f]{12}$")
#: What a session is marked by, for its engine cores in other processes: see `kvhook.core.plan.CorePlan.mark`.
MARK_PREFIX = "kvhook-session-"
# process, its start, session, and the namespace in which the process has this number
_MARK_NAME = re.compile(MARK_PREFIX + r"(\d{1,10})-(\d{1,19})-\w+(?:-(\d{1,20}))?")
_HISTORY_NAME = re.compile(HISTORY_PREFIX + r"(\d{1,10})-(\d{1,19})-\w+")


def prune(
    place: Path, most_rings: int = MOST_RINGS, most_bytes: int = MOST_BYTES, streams: Iterable[str] = FRONT_ENDS
) -> list[Path]:
    """Remove the oldest rings of ended processes until the others are few and small enough. The newest of them always
    stays, so that `kvhook autopsy` can read it.

    Returns:
        What was removed. A ring that cannot be removed stays, and no error is raised.
    """
    with contextlib.suppress(OSError):
        disk = os.statvfs(place)
        most_bytes = min(most_bytes, int(disk.f_frsize * disk.f_blocks * MOST_SHARE))
    ended = [ring for ring, _ in map(glance, ring_files([place], streams)) if ring.state != ALIVE]
    ended.sort(key=lambda r: (r.started, r.path.name), reverse=True)
    removed, total = [], 0
    for i, ring in enumerate(ended):
        total += ring.bytes
        if i and (i >= most_rings or total > most_bytes) and remove_path(ring.path):
            removed.append(ring.path)
            total -= ring.bytes
    return removed


def prune_histories(history: Path) -> None:
    """Remove the old histories of processes that were killed. One that cannot be removed stays; nothing is raised."""
    with contextlib.suppress(Exception):
        for leftover in left_histories(history):
            if leftover.age > OLD:
                remove(leftover)


class Leftover(NamedTuple):
    """Something that an ended process has left behind."""

    path: Path
    bytes: int
    #: seconds since it was last used
    age: float


def leftovers(places: Iterable[Path], history: Path, now: float | None = None) -> list[Leftover]:
    """What ended processes have left behind: rings, marks of sessions, temporary histories. Never what is in use.

    Args:
        places: directories of rings.
        history: the directory of histories.
        now: the time, in seconds since 1970.
    """
    now = time.time() if now is None else now
    rings = [
        Leftover(r.path, r.bytes, max(0.0, now - (r.last or r.started)))
        for r in find_rings(places, ALL_STREAMS)
        if r.state != ALIVE or (r.elsewhere and now - (r.last or r.started) > OLD)
    ]
    return rings + left_marks(history, now) + left_histories(history, now)


def name_of_mark(pid: int, session: str) -> str:
    """The file name of the mark of a session of the process `pid`, which runs."""
    return f"{MARK_PREFIX}{pid}-{process_start(pid)}-{session}-{pid_namespace()}"


def left_marks(history: Path, now: float) -> list[Leftover]:
    """The marks of sessions whose processes were killed; they are empty files. Of a process in another container
    nothing can be known: its mark is left over when it is old."""
    found = []
    for path in entries(history):
        match, info = _MARK_NAME.fullmatch(path.name), info_of(path)
        if match and info and is_ours(path, stat.S_ISREG) and not is_alive(int(match[1]), int(match[2])):
            theirs, ours = int(match[3] or 0), pid_namespace()
            age = max(0.0, now - info.st_mtime)
            if age > OLD or not (theirs and ours and theirs != ours):
                found.append(Leftover(path, info.st_size, age))
    return found


def left_histories(history: Path, now: float | None = None) -> list[Leftover]:
    """The temporary histories of processes that were killed; others remove theirs themselves."""
    now = time.time() if now is None else now
    found = []
    for folder in entries(history):
        match = _HISTORY_NAME.fullmatch(folder.name)
        info = info_of(folder)
        if match and info and is_ours(folder, stat.S_ISDIR) and not is_alive(int(match[1]), int(match[2])):
            files = [f for path in entries(folder) if (f := info_of(path))]
            age = max(0.0, now - max((f.st_mtime for f in files), default=info.st_mtime))
            # an empty one may have just been made in another container
            if age > OLD or (files and not _from_elsewhere(entries(folder)[0])):
                found.append(Leftover(folder, sum(f.st_size for f in files), age))
    return found


def remove(leftover: Leftover) -> bool:
    """Remove it; False if that is not possible."""
    return remove_path(leftover.path)


def history_of(pid: int, start: int, history: Path) -> Path | None:
    """The directory with the temporary history of a process, if it is still there."""
    return next((f for f in histories_of(pid, start, history) if not _OF_CORES.search(f.name)), None)


def histories_of(pid: int, start: int, history: Path) -> list[Path]:
    """That directory, and the one with what its engine cores recorded."""
    found = []
    for folder in entries(history):
        match = _HISTORY_NAME.fullmatch(folder.name)
        if match and (int(match[1]), int(match[2])) == (pid, start) and is_ours(folder, stat.S_ISDIR):
            found.append(folder)
    return found


def _from_elsewhere(path: Path) -> bool:
    try:
        return is_elsewhere(header_of(path))
    except (KvhookError, OSError):
        return False
