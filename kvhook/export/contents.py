"""What an export of several tables holds: their names, and their rows as they come.

Beside the steps: finished requests and single latencies, and what engine cores recorded, where they did.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kvhook.export.latencies import TYPES, latency_rows
from kvhook.records.columns import Table
from kvhook.records.core import CoreRecords
from kvhook.records.tables import Records
from kvhook.ring.layout import make_layout
from kvhook.ring.slots import slot_head
from kvhook.schema import KINDS

#: Kind of record -> the name of its table.
TABLES = {
    "step": "steps",
    "request": "requests",
    "latency": "latencies",
    "core_step": "core_steps",
    "core_request": "core_requests",
    "preemption": "preemptions",
    "lookup": "lookups",
    "blocks": "blocks",
}
#: Those of the front end.
FRONT = ("step", "request", "latency")


def beside(path: Path, kind: str) -> Path:
    """The file of a table: ``run.parquet`` of the steps, ``run.requests.parquet`` of the requests."""
    return path if kind == "step" else path.with_name(f"{path.stem}.{TABLES[kind]}{path.suffix}")


def facts(records: Records, cores: CoreRecords | None) -> dict[str, Any]:
    """What a file says of a run beside its tables: ``meta``, and under ``cores`` what is known of the engine cores."""
    return {**records.meta, "cores": cores.told() if cores is not None and len(cores) else None}


def all_tables(records: Records, cores: CoreRecords | None) -> Iterator[tuple[str, Table]]:
    """Kind and rows of all tables: the front end's, then those of the engine cores."""
    yield from front_tables(records)
    if cores is not None:
        yield from core_tables(cores)


def empty(records: Records, kind: str) -> Table:
    """A table of the front end without rows: its columns."""
    if kind == "latency":
        return np.empty(0, TYPES)
    layout = records.sources[0].layout if records.sources else make_layout({})
    return records.table(np.empty((0, layout.slot_bytes), np.uint8), layout, kind)


def front_tables(records: Records) -> Iterator[tuple[str, Table]]:
    """Kind and rows of the front end's tables, in the order of the run, some thousands at a time."""
    for slots, layout in records.chunks():
        kinds = slot_head(slots)["kind"]
        for kind in ("request", "step"):
            mine = kinds == KINDS[kind][0]
            if mine.any():
                yield kind, records.table(slots[mine], layout, kind)
        for rows in latency_rows(records, slots, layout):
            if len(rows):
                yield "latency", rows


def core_tables(cores: CoreRecords, core: int | None = None) -> Iterator[tuple[str, Table]]:
    """Kind and rows of the engine cores' tables, those that have any."""
    readers = {
        "core_step": cores.steps,
        "core_request": cores.requests,
        "preemption": cores.preemptions,
        "lookup": cores.lookups,
        "blocks": cores.blocks,
    }
    for kind, read in readers.items():
        table = read(core)
        if len(table) or (kind == "core_step" and len(cores)):
            yield kind, table
