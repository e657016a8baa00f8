"""Writing a run in other formats: one module per format, one table of suffixes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import IO

from kvhook.errors import ExportError
from kvhook.export import arrow, csv, hive, jsonl, kvh, perfetto
from kvhook.files import Opener, check_target, written_beside
from kvhook.records.core import CoreRecords
from kvhook.records.tables import Records

#: Given the run, the file's name, a function that opens files, and what engine cores recorded (None: nothing).
Writer = Callable[[Records, Path, Opener, "CoreRecords | None"], None]

#: Suffix -> writer.
FORMATS: dict[str, Writer] = {
    ".jsonl": jsonl.write,
    ".csv": csv.write,
    ".kvh": lambda records, path, opener, _: kvh.write(records, path, opener),
    ".parquet": arrow.write_parquet,
    ".arrow": arrow.write_arrow,
    ".perfetto.json.gz": perfetto.write,
}


def export(
    records: Records,
    path: Path,
    *,
    cores: CoreRecords | None = None,
    overwrite: bool = False,
    compress: bool = False,
) -> list[Path]:
    """Write a run to `path`, in the format of its suffix.

    Args:
        records: the run.
        path: the file.
        cores: what its engine cores recorded; for the formats that have room for it.
        overwrite: replace a file that is there.
        compress: a ``.kvh`` file in a tenth of the space.

    Returns:
        The files written.

    Raises:
        ExportError: the suffix is not known, a package is missing, or a file is in the way and `overwrite` is not set.
        OSError: a file cannot be written. Nothing is left half written, and what was there is untouched.
    """
    writer = FORMATS.get(suffix_of(path))
    if writer is None:
        known = ", ".join(FORMATS)
        raise ExportError(
            f"cannot tell a format from {path.name!r}: the name must end in one of {known}; "
            "or in / for a folder of many runs"
        )
    if compress:
        if path.suffix != ".kvh":
            raise ExportError(f"{path.name}: only .kvh files are compressed; gzip does it with the others")
        with written_beside() as (opener, names):
            kvh.write_compressed(records, path, _checked(opener, overwrite))
        return names
    with written_beside() as (opener, names):
        writer(records, path, _checked(opener, overwrite), cores)
    return names


def export_to_folder(
    records: Records, folder: Path, run: str, *, cores: CoreRecords | None = None, overwrite: bool = False
) -> list[Path]:
    """Write a run into a folder of many, see `kvhook.export.hive`. Arguments and errors are those of `export`."""
    with written_beside() as (opener, names):
        hive.write(records, folder, _checked(opener, overwrite), cores, run)
    return names


def suffix_of(path: Path) -> str:
    """The suffix that says the format; "" if it is none of them."""
    return max((s for s in FORMATS if path.name.endswith(s) and path.name != s), key=len, default="")


def _checked(opener: Opener, overwrite: bool) -> Opener:
    """An opener that refuses files that are in the way."""

    def open_checked(path: Path) -> IO[bytes]:
        check_target(path, overwrite=overwrite)
        return opener(path)

    return open_checked
