"""Which values of a table are not known: they are empty, null or left out in every export. No other module of the
exports decides this."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvhook.core_schema import BLOCK_EVENT_TIMES, CORE_KINDS
from kvhook.records.columns import Table
from kvhook.records.levels import not_recorded
from kvhook.schema import GAUGE, KINDS, TIME, unix_columns

Mask = npt.NDArray[np.bool_]

#: Kind of record -> the columns in which -1 stands for what is not known.
_MINUS_ONE = {
    kind: {f.name for f in fields if f.role == GAUGE} | unix_columns(fields).keys()
    for kind, (_, fields) in KINDS.items()
} | {
    kind: {f.name for f in fields if f.role in (GAUGE, TIME)} | unix_columns(fields).keys()
    for kind, (_, fields) in CORE_KINDS.items()
}
_MINUS_ONE["blocks"] = set(BLOCK_EVENT_TIMES)


def unknown(table: Table, kind: str) -> dict[str, Mask]:
    """Column -> in which rows its value is not known, of the columns that have such rows."""
    masks = {name: mask.copy() for name, mask in (not_recorded(table) if kind == "step" else {}).items()}
    for name in table.dtype.names or ():
        mask = _of_column(table[name], name in _MINUS_ONE.get(kind, ()))
        if mask is not None:
            masks[name] = masks[name] | mask if name in masks else mask
    return {name: mask for name, mask in masks.items() if mask.any()}


def _of_column(column: npt.NDArray[Any], minus_one: bool) -> Mask | None:
    nothing: Mask | None = None
    if column.dtype.kind == "f":
        nothing = np.isnan(column)
    if minus_one:
        below = column == -1
        nothing = below if nothing is None else nothing | below
    return nothing
