"""CSV: ``run.csv`` holds the steps, ``run.requests.csv`` the finished requests. Unknown values are empty."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from kvhook.files import Opener
from kvhook.records.rows import rows
from kvhook.records.tables import Records


def write(records: Records, path: Path, opener: Opener) -> None:
    """Two tables, each with a line of column names."""
    writers = {}
    for kind, name in (("step", path), ("request", path.with_suffix(f".requests{path.suffix}"))):
        text = io.TextIOWrapper(opener(name), encoding="utf-8", newline="", write_through=True)
        names = ["engine", *(c.name for c in records.columns(kind))]
        writers[kind] = (csv.DictWriter(text, names), text)
        writers[kind][0].writeheader()
    for kind, batch in rows(records):
        writers[kind][0].writerows(batch)
    for _, text in writers.values():
        text.detach()
