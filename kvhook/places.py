"""Which files a path stands for: those of a folder or of a pattern; and what to name where there is no such file."""

from __future__ import annotations

import contextlib
import difflib
import glob
from pathlib import Path

from kvhook.errors import KvhookError
from kvhook.exported import READERS, is_beside
from kvhook.records.core_files import is_of_core
from kvhook.ring.trace_file import TRACE_SUFFIX


def several(place: Path) -> list[Path]:
    """The traces of a folder, or those that a pattern such as ``run*.kvh`` matches; empty for the name of one file.

    Raises:
        KvhookError: there are none.
    """
    try:
        if place.is_dir():
            found, what = sorted(place.glob(f"*{TRACE_SUFFIX}")), f"the folder {place}"
            found = found or sorted(path for suffix in READERS for path in place.glob(f"*{suffix}"))
        elif glob.has_magic(str(place)) and not place.exists():
            found, what = sorted(map(Path, glob.glob(str(place)))), f"the pattern {place}"
        else:
            return []
    except (OSError, ValueError):
        return []  # opening it says what is wrong
    found = [path for path in found if _is_a_run(path)]
    if not found:
        raise KvhookError(f"{what} holds no {TRACE_SUFFIX} file and no exported run")
    return found


def _is_a_run(path: Path) -> bool:
    """Those of engine cores, and other tables of an exported run, belong to the files beside them."""
    return not is_of_core(path) and not is_beside(path)


def instead_of(place: Path) -> str:
    """What to open instead of a file that is not there: those that ranks or children of a process have written beside
    it, or the one with the most similar name. "" if there is nothing of the kind."""
    with contextlib.suppress(OSError, ValueError):
        return "" if place.exists() else _of_other_processes(place) or _near(place)
    return ""


def _of_other_processes(place: Path) -> str:
    if place.suffix != TRACE_SUFFIX:
        return ""
    found = sorted(place.parent.glob(f"{glob.escape(place.stem)}-*{TRACE_SUFFIX}"))
    if not found:
        return ""
    pattern = place.with_name(f"{place.stem}-*{TRACE_SUFFIX}")
    names = ", ".join(p.name for p in found[:3]) + (", ..." if len(found) > 3 else "")
    return f". There are {names} beside it, of other processes: kvhook.open({str(pattern)!r}) opens them together"


def _near(place: Path) -> str:
    suffixes = (TRACE_SUFFIX, *READERS)
    there = [path.name for path in place.parent.iterdir() if path.suffix in suffixes and _is_a_run(path)]
    near = difflib.get_close_matches(place.name, there, 1)
    return f"; there is {place.with_name(near[0])}" if near else ""
