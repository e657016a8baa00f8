"""The directories of rings, and the ring files of this user in them. Nothing raises for a file that has just gone."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from kvhook.ring.notes import notes_of
from kvhook.ring.place import ENV_DIR, RING_NAME, RING_SUFFIX, RING_SUFFIXES, default_directories

#: What find_rings and others look for by default: rings of front ends, which have the engine's steps.
FRONT_ENDS = ("",)
#: Those, and what was recorded inside the engine core.
ALL_STREAMS = tuple(RING_SUFFIXES)


def directories(wanted: str | os.PathLike[str] | None = None) -> list[Path]:
    """Where rings of this user may be: the directory that is asked for, else ``KVHOOK_DIR`` and the default places.

    A default place that is a link, or belongs to another user, is left out: its name can be guessed.
    """
    if wanted:
        return [Path(wanted)]
    places = [Path(asked)] if (asked := os.environ.get(ENV_DIR)) else []
    for place in default_directories():
        with contextlib.suppress(OSError):
            info = os.lstat(place)
            if stat.S_ISDIR(info.st_mode) and info.st_uid == os.geteuid() and place not in places:
                places.append(place)
    return places


def ring_files(places: Iterable[Path], streams: Iterable[str] = FRONT_ENDS) -> Iterator[Path]:
    """The ring files of this user in these directories, of these streams."""
    suffixes = {RING_SUFFIXES[stream] for stream in streams}
    for place in places:
        for path in entries(place):
            if path.suffix in suffixes and RING_NAME.fullmatch(path.name) and is_ours(path, stat.S_ISREG):
                yield path


def entries(place: Path) -> list[Path]:
    """What is in a directory, sorted; nothing if it cannot be read."""
    try:
        return sorted(place / name for name in os.listdir(place))
    except OSError:
        return []


def info_of(path: Path) -> os.stat_result | None:
    """Size, owner and times of a file, a link not followed; None if it is gone."""
    try:
        return os.lstat(path)
    except OSError:
        return None


def is_ours(path: Path, kind: Callable[[int], bool]) -> bool:
    """Whether a file is of this user and of a kind, `stat.S_ISDIR` say."""
    info = info_of(path)
    return info is not None and kind(info.st_mode) and info.st_uid == os.geteuid()


def remove_path(path: Path) -> bool:
    """Remove a file or a directory; False if that is not possible."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
            if path.suffix == RING_SUFFIX:
                notes_of(path).unlink(missing_ok=True)
    except OSError:
        return False
    return True
