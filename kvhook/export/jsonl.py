"""JSON lines: one line of metadata, then one line per finished request and per step."""

from __future__ import annotations

import json
from pathlib import Path

from kvhook.files import Opener
from kvhook.records.rows import rows
from kvhook.records.tables import Records


def write(records: Records, path: Path, opener: Opener) -> None:
    """Each line is an object with ``kind``: ``meta``, ``request`` or ``step``. Unknown values are null."""
    file = opener(path)
    file.write(json.dumps({"kind": "meta", **records.meta}, default=str).encode() + b"\n")
    for kind, batch in rows(records):
        file.write(b"".join(json.dumps({"kind": kind, **row}).encode() + b"\n" for row in batch))
