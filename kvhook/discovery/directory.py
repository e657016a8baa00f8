"""Looking at files that may be gone in the next moment. Nothing raises."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from kvhook.ring.notes import notes_of
from kvhook.ring.place import RING_SUFFIX


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
