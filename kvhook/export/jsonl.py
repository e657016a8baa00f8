"""JSON lines: one line of metadata, then one line per finished request and per step."""

from __future__ import annotations

import json
from pathlib import Path

from kvhook.export.cells import lines, tables
from kvhook.files import Opener
from kvhook.records.tables import Records

#: What Python's json writes for what JSON has no number for.
_INFINITE = {"inf": "Infinity", "-inf": "-Infinity"}


def write(records: Records, path: Path, opener: Opener) -> None:
    """Each line is an object with ``kind``: ``meta``, ``request`` or ``step``. Unknown values are null."""
    file = opener(path)
    file.write(json.dumps({"kind": "meta", **records.meta}, default=str).encode() + b"\n")
    for kind, table in tables(records):
        begin = f'{{"kind": "{kind}", "engine": '
        file.write(
            lines(
                table,
                kind,
                "null",
                lambda value: _INFINITE.get(value) or json.dumps(value),
                lambda name, begin=begin: begin if name == "engine" else f', "{name}": ',  # type: ignore[misc]
                "}\n",
            )
        )
