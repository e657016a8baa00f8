"""Writing a run in other formats: one module per format, one table of suffixes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import IO

from kvhook.errors import ExportError
from kvhook.export import csv, jsonl, kvh
from kvhook.files import Opener, written_beside
from kvhook.records.tables import Records

#: Suffix -> writer. A writer is given the run and a function that opens its files, and writes.
FORMATS: dict[str, Callable[[Records, Path, Opener], None]] = {
    ".jsonl": jsonl.write,
    ".csv": csv.write,
    ".kvh": kvh.write,
}


def export(records: Records, path: Path, *, overwrite: bool = False, compress: bool = False) -> list[Path]:
    """Write a run to `path`, in the format of its suffix.

    Args:
        records: the run.
        path: the file.
        overwrite: replace a file that is there.
        compress: a ``.kvh`` file in a tenth of the space.

    Returns:
        The files written.

    Raises:
        ExportError: the suffix is not known, or a file is in the way and `overwrite` is not set.
        OSError: a file cannot be written. Nothing is left half written, and what was there is untouched.
    """
    writer = FORMATS.get(path.suffix)
    if writer is None:
        known = ", ".join(FORMATS)
        raise ExportError(f"cannot tell a format from {path.name!r}: the name must end in one of {known}")
    if compress:
        if path.suffix != ".kvh":
            raise ExportError(f"{path.name}: only .kvh files are compressed; gzip does it with the others")
        writer = kvh.write_compressed
    with written_beside() as (opener, names):
        writer(records, path, _checked(opener, overwrite))
    return names


def _checked(opener: Opener, overwrite: bool) -> Opener:
    """An opener that refuses files that are in the way."""

    def open_checked(path: Path) -> IO[bytes]:
        if path.exists() and not overwrite:
            raise ExportError(f"{path} exists; take another name, or say overwrite=True (kvhook export --force)")
        if not path.parent.is_dir():
            raise ExportError(f"cannot write {path}: there is no directory {path.parent}; make it first")
        return opener(path)

    return open_checked
