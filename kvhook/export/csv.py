"""CSV: ``run.csv`` holds the steps, ``run.requests.csv`` the finished requests. Unknown values are empty."""

from __future__ import annotations

import itertools
from pathlib import Path

from kvhook.export.cells import Cells, columns, tables
from kvhook.files import Opener
from kvhook.records.columns import Table
from kvhook.records.tables import Records

_END = "\r\n"


def write(records: Records, path: Path, opener: Opener) -> None:
    """Two tables, each with a line of column names."""
    files = {}
    for kind, name in (("step", path), ("request", path.with_suffix(f".requests{path.suffix}"))):
        files[kind] = opener(name)
        names = ["engine", *(c.name for c in records.columns(kind))]
        files[kind].write(f"{','.join(names)}{_END}".encode())
    for kind, table in tables(records):
        files[kind].write(_lines(table, kind))


def _lines(table: Table, kind: str) -> bytes:
    """The rows of a table. Neighbours that are the same in all rows are one text."""
    pieces: list[Cells] = []
    for _, cells in columns(table, kind, ""):
        if isinstance(cells, str) and pieces and isinstance(pieces[-1], str):
            pieces[-1] += f",{cells}"
        else:
            pieces.append(cells)
    rows = zip(*(itertools.repeat(p, len(table)) if isinstance(p, str) else p for p in pieces), strict=True)
    return (_END.join(map(",".join, rows)) + _END).encode()
