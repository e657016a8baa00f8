"""Rows of a table as plain Python values, with None for what is not known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kvhook.records.columns import Table
from kvhook.records.levels import not_recorded
from kvhook.records.tables import Records
from kvhook.ring.slots import slot_head
from kvhook.schema import GAUGE, KINDS, unix_columns

Row = dict[str, Any]

#: Kind of record -> columns in which -1 stands for what is not known.
_GAUGES = {
    kind: {f.name for f in fields if f.role == GAUGE} | unix_columns(fields).keys()
    for kind, (_, fields) in KINDS.items()
}


def rows(records: Records) -> Iterator[tuple[str, list[Row]]]:
    """Kind (``"step"`` or ``"request"``) and rows, in the order of the run, some thousands at a time.

    None stands for a state in a step that brought no stats, for a value that vLLM did not give, and for a count that
    was not made at a lower level.
    """
    for slots, layout in records.chunks():
        kinds = slot_head(slots)["kind"]
        for kind in ("request", "step"):
            table = records.table(slots[kinds == KINDS[kind][0]], layout, kind)
            if len(table):
                yield kind, as_rows(table, kind)


def as_rows(table: Table, kind: str) -> list[Row]:
    """A table of `Records.steps` or `Records.requests` as dictionaries; None for what is not known.

    Args:
        table: the rows.
        kind: ``"step"`` or ``"request"``.
    """
    names = table.dtype.names or ()
    columns = [_none_for_unknown(table[name].tolist(), name in _GAUGES[kind]) for name in names]
    for name, unknown in (not_recorded(table) if kind == "step" else {}).items():
        i = names.index(name)
        columns[i] = [None if u else v for u, v in zip(unknown.tolist(), columns[i], strict=True)]
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def _none_for_unknown(values: list[Any], gauge: bool) -> list[Any]:
    return [None if v != v or (gauge and v == -1) else v for v in values]
