"""Reports as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePath

from kvhook.files import check_target, written_beside
from kvhook.report.page import page
from kvhook.report.runs import Run


def write_report(path: Path, runs: Sequence[Run], version: str, *, overwrite: bool = False) -> Path:
    """Write one HTML file that shows these runs.

    Raises:
        ExportError: the file exists, or its directory does not.
        OSError: it cannot be written.
    """
    check_target(path, overwrite=overwrite)
    with written_beside() as (opener, _):
        opener(path).write(page(runs, version).encode())
    return path


def names_of(paths: Sequence[str]) -> list[str]:
    """What to call some runs: the last part of their path without its suffix, with a number where it is the same."""
    names: list[str] = []
    for path in paths:
        stem = PurePath(path).stem or path
        same = sum(name == stem or name.startswith(f"{stem} (") for name in names)
        names.append(f"{stem} ({same + 1})" if same else stem)
    return names
