"""CSV: ``run.csv`` holds the steps, ``run.requests.csv`` the finished requests. Unknown values are empty."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING

from kvhook.export.rows import rows

if TYPE_CHECKING:
    from kvhook.trace import Trace


def write(trace: Trace, path: Path, opener: Callable[[Path], IO[bytes]]) -> None:
    """Two tables, each with a line of column names."""
    writers = {}
    for kind, name in (("step", path), ("request", path.with_suffix(f".requests{path.suffix}"))):
        text = io.TextIOWrapper(opener(name), encoding="utf-8", newline="", write_through=True)
        names = ["engine", *(c.name for c in trace.columns(kind))]
        writers[kind] = (csv.DictWriter(text, names), text)
        writers[kind][0].writeheader()
    for kind, some in rows(trace):
        writers[kind][0].writerows(some)
    for _, text in writers.values():
        text.detach()
