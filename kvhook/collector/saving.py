"""The collector's answers as files."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from kvhook.analysis.history import COLUMNS, History, count_or_share
from kvhook.errors import KvhookError
from kvhook.files import written_beside

#: What can be saved: the history as a table, or everything.
SUFFIXES = (".csv", ".json")


def check_suffix(path: Path) -> None:
    """Raises `KvhookError` for a file that cannot be saved."""
    if path.suffix not in SUFFIXES:
        raise KvhookError(f"{path}: metrics are saved as .csv (the history) or .json (everything)")


def save_table(path: Path, method: str, rows: History) -> None:
    """Write the history as CSV; a value that is not known is empty.

    Args:
        path: the file; one that is there is replaced.
        method: the collection method of all rows.
        rows: the history.

    Raises:
        OSError: it cannot be written; what was there is untouched.
    """
    with written_beside() as (opener, _):
        text = io.TextIOWrapper(opener(path), encoding="utf-8", newline="")
        writer = csv.writer(text)
        writer.writerow(["collection_method", *COLUMNS[1:]])
        for row in rows.tolist():
            cells = zip(COLUMNS[1:], row[1:], strict=True)
            writer.writerow([method, *("" if v != v else count_or_share(name, v) for name, v in cells)])
        text.flush()
        text.detach()


def save_json(path: Path, stats: dict[str, Any]) -> None:
    """Write everything as JSON.

    Args:
        path: the file; one that is there is replaced.
        stats: what is written.

    Raises:
        OSError: it cannot be written; what was there is untouched.
    """
    with written_beside() as (opener, _):
        file = opener(path)
        text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
        json.dump(stats, text, indent=1, allow_nan=False)
        text.detach()
