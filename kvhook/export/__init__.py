"""Writing a trace in other formats: one module per format, one table of suffixes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from kvhook.errors import ExportError
from kvhook.export import csv, jsonl, kvh

if TYPE_CHECKING:
    from kvhook.trace import Trace

#: Suffix -> writer. A writer is given the trace and a function that opens its files, and writes.
FORMATS: dict[str, Callable[[Trace, Path, Opener], None]] = {
    ".jsonl": jsonl.write,
    ".csv": csv.write,
    ".kvh": kvh.write,
}

#: Opens a file for writing that takes its name only when all is written.
Opener = Callable[[Path], IO[bytes]]


def export(trace: Trace, path: Path, *, overwrite: bool = False) -> list[Path]:
    """Write a trace to `path`, in the format of its suffix.

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
    with _files(overwrite) as (opener, names):
        writer(trace, path, opener)
    return names


@contextlib.contextmanager
def _files(overwrite: bool) -> Iterator[tuple[Opener, list[Path]]]:
    """Files that are written under another name and appear together, complete, or not at all."""
    names: list[Path] = []
    opened: list[tuple[IO[bytes], Path, Path]] = []

    def opener(path: Path) -> IO[bytes]:
        if path.exists() and not overwrite:
            raise ExportError(f"{path} exists; take another name, or say overwrite=True (kvhook export --force)")
        if not path.parent.is_dir():
            raise ExportError(f"cannot write {path}: there is no directory {path.parent}; make it first")
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        file = open(temporary, "wb")  # noqa: SIM115
        opened.append((file, temporary, path))
        return file

    try:
        yield opener, names
        for file, _, _ in opened:
            file.close()
        for _, temporary, path in opened:
            os.replace(temporary, path)
            names.append(path)
    except BaseException:
        for file, temporary, _ in opened:
            with contextlib.suppress(OSError):
                file.close()
            temporary.unlink(missing_ok=True)
        raise
