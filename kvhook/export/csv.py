"""CSV: ``run.csv`` holds the steps, ``run.requests.csv`` the finished requests. Unknown values are empty."""

from __future__ import annotations

from pathlib import Path

from kvhook.export.cells import lines, tables
from kvhook.files import Opener
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
        files[kind].write(lines(table, kind, "", str, lambda name: "" if name == "engine" else ",", _END))
