"""Reports as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePath

from kvhook.errors import ExportError
from kvhook.files import written_beside
from kvhook.report.page import page
from kvhook.report.runs import Run


def write_report(path: Path, runs: Sequence[Run], version: str, *, overwrite: bool = False) -> Path:
    """Write one HTML file that shows these runs.

    Raises:
        ExportError: the file exists, or its directory does not.
        OSError: it cannot be written.
    """
    check(path, overwrite)
    with written_beside() as (opener, _):
        opener(path).write(page(runs, version).encode())
    return path


def check(path: Path, overwrite: bool) -> None:
    """Whether a file may be written.

    Raises:
        ExportError: it exists, or its directory does not.
    """
    if path.exists() and not overwrite:
        raise ExportError(f"{path} exists; take another name, or say overwrite=True (--force)")
    if not path.parent.is_dir():
        raise ExportError(f"cannot write {path}: there is no directory {path.parent}; make it first")


def names_of(paths: Sequence[str]) -> list[str]:
    """What to call some runs: the last part of their path without its suffix, with a number where it is the same."""
    names: list[str] = []
    for path in paths:
        stem = PurePath(path).stem or path
        same = sum(name == stem or name.startswith(f"{stem} (") for name in names)
        names.append(f"{stem} ({same + 1})" if same else stem)
    return names
