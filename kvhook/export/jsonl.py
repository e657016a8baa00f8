"""JSON lines: one line of metadata, then one line per finished request and per step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING

from kvhook.export.rows import rows

if TYPE_CHECKING:
    from kvhook.trace import Trace


def write(trace: Trace, path: Path, opener: Callable[[Path], IO[bytes]]) -> None:
    """Each line is an object with ``kind``: ``meta``, ``request`` or ``step``. Unknown values are null."""
    file = opener(path)
    file.write(json.dumps({"kind": "meta", **trace.meta}, default=str).encode() + b"\n")
    for kind, some in rows(trace):
        file.write(b"".join(json.dumps({"kind": kind, **row}).encode() + b"\n" for row in some))
