"""CSV: ``run.csv`` holds the steps, ``run.requests.csv`` the finished requests, and so on; ``run.meta.json`` holds the
facts about the run. Unknown values are empty."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import IO

from kvhook.export.cells import Cells, columns, tables
from kvhook.export.contents import FRONT, beside, empty, facts
from kvhook.files import Opener
from kvhook.records.columns import Table
from kvhook.records.core import CoreRecords
from kvhook.records.tables import Records

_END = "\r\n"


def write(records: Records, path: Path, opener: Opener, cores: CoreRecords | None) -> None:
    """A file for each table, with a line of column names, and one of facts."""
    files = {kind: _begin(opener(beside(path, kind)), empty(records, kind)) for kind in FRONT}
    for kind, table in tables(records, cores):
        if kind not in files:
            files[kind] = _begin(opener(beside(path, kind)), table)
        files[kind].write(_lines(table, kind))
    opener(facts_beside(path)).write(json.dumps(facts(records, cores), default=str).encode() + b"\n")


def facts_beside(path: Path) -> Path:
    """The file with the facts about the run whose steps are in this one."""
    return path.with_name(f"{path.stem}.meta.json")


def _begin(file: IO[bytes], table: Table) -> IO[bytes]:
    file.write(f"{','.join(table.dtype.names or ())}{_END}".encode())
    return file


def _text(value: str) -> str:
    """A text, in quotes where a comma, a quote or the end of a line would break the table."""
    return '"' + value.replace('"', '""') + '"' if any(c in value for c in ',"\r\n') else value


def _lines(table: Table, kind: str) -> bytes:
    """The rows of a table. Neighbours that are the same in all rows are one text."""
    pieces: list[Cells] = []
    for _, cells in columns(table, kind, "", _text):
        if isinstance(cells, str) and pieces and isinstance(pieces[-1], str):
            pieces[-1] += f",{cells}"
        else:
            pieces.append(cells)
    rows = zip(*(itertools.repeat(p, len(table)) if isinstance(p, str) else p for p in pieces), strict=True)
    return (_END.join(map(",".join, rows)) + _END).encode()
