"""A folder of Parquet files that holds many runs, laid out as Hive does: ``run=NAME/engine=N/steps.parquet``.

DuckDB, Polars, Spark and Ray read one table of all runs with one pattern, ``FOLDER/*/*/steps.parquet``, and make the
columns ``run`` and ``engine`` of the names of the folders. What engine cores recorded is in ``run=NAME/core=N/``.
"""

from __future__ import annotations

import os
import urllib.parse
from pathlib import Path
from typing import IO

import numpy as np

from kvhook.errors import ExportError
from kvhook.export.arrow import TableFile, completed, core_facts, parquet_writer, run_facts
from kvhook.export.contents import FRONT, TABLES, core_tables, empty, front_tables
from kvhook.files import Opener
from kvhook.records.core import CoreRecords
from kvhook.records.tables import Records


def write(records: Records, folder: Path, opener: Opener, cores: CoreRecords | None, run: str) -> None:
    """Write one run into the folder, beside those that are there.

    Args:
        records: the run.
        folder: of all runs; it is made if it is not there.
        opener: opens the files.
        cores: what its engine cores recorded.
        run: its name, which no other run of the folder may have.
    """
    make = parquet_writer(folder)
    home = folder / f"run={partition_name(run)}"
    facts = run_facts(records) | {"kvhook.run": run}
    with completed() as files:
        for number in [e["engine"] for e in records.meta["engines"]]:
            for kind in FRONT:
                file = _open(opener, home / f"engine={number}" / f"{TABLES[kind]}.parquet")
                about = facts | {"kvhook.engine": str(number)}
                files[kind, number] = TableFile(file, make, kind, empty(records, kind), about, ["engine"])
        for kind, table in front_tables(records):
            for number in np.unique(table["engine"]).tolist():
                if (kind, number) in files:
                    files[kind, number].take(table[table["engine"] == number])
        for number in range(len(cores) if cores is not None else 0):
            assert cores is not None
            for kind, table in core_tables(cores, number):
                file = _open(opener, home / f"core={number}" / f"{TABLES[kind]}.parquet")
                about = core_facts(records, cores) | {"kvhook.run": run, "kvhook.core": str(number)}
                files[kind, f"core {number}"] = TableFile(file, make, kind, table, about, ["core"])
                files[kind, f"core {number}"].take(table)


def _open(opener: Opener, path: Path) -> IO[bytes]:
    path.parent.mkdir(parents=True, exist_ok=True)
    return opener(path)


def partition_name(run: str) -> str:
    """A run's name as the part of a folder's name; readers decode it.

    Raises:
        ExportError: it is empty.
    """
    if not run:
        raise ExportError("a run needs a name: kvhook export ... --run NAME")
    return urllib.parse.quote(run, safe=" +@,()[]")


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether an export goes into a folder of runs: its name ends in ``/``, or it is a folder already."""
    text = os.fspath(path)
    return text.endswith(os.sep) or (os.path.isdir(text) and not os.path.splitext(text)[1])
