"""The cells of a table as text, column by column.

Most columns of a run hold one value for thousands of steps: such a column is one text. Where orjson is installed
(``pip install "kvhook[fast]"``) it writes the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from kvhook.export.contents import all_tables
from kvhook.export.unknown import Mask, unknown
from kvhook.records.columns import Table
from kvhook.records.core import CoreRecords
from kvhook.records.tables import Records

try:
    import orjson as _orjson
except ImportError:
    orjson: Any = None
else:
    orjson = _orjson

#: Rows that are written at a time: their texts take some 10 MB.
ROWS = 4096


def tables(records: Records, cores: CoreRecords | None) -> Iterator[tuple[str, Table]]:
    """Kind and rows of all tables, at most `ROWS` at a time."""
    for kind, table in all_tables(records, cores):
        for first in range(0, len(table), ROWS):
            yield kind, table[first : first + ROWS]


#: The cells of a column: one text if all are the same.
Cells = list[str] | str


def columns(table: Table, kind: str, nothing: str, text: Callable[[str], str] = str) -> Iterator[tuple[str, Cells]]:
    """Name and cells of each column of a table.

    Args:
        table: the rows; at least one.
        kind: of its records.
        nothing: what stands for a value that is not known.
        text: writes a cell that is text.
    """
    masks = unknown(table, kind)
    for name in table.dtype.names or ():
        yield name, _cells(table[name], masks.get(name), nothing, text)


def _cells(column: npt.NDArray[Any], mask: Mask | None, nothing: str, text: Callable[[str], str]) -> Cells:
    column = np.ascontiguousarray(column)
    if mask is not None and mask.all():
        return nothing
    if mask is None and (column == column[0]).all():
        return _texts(column[:1], text)[0]
    cells = _texts(column, text)
    for i in mask.nonzero()[0].tolist() if mask is not None else ():
        cells[i] = nothing
    return cells


def _texts(column: npt.NDArray[Any], text: Callable[[str], str]) -> list[str]:
    if column.dtype.kind == "U":
        return [text(value) for value in column.tolist()]
    # orjson has no infinity
    if orjson is not None and not (column.dtype.kind == "f" and np.isinf(column).any()):
        written: str = orjson.dumps(column, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1].decode()
        return written.split(",")
    if column.dtype.kind == "f":
        return [text(repr(value)) if value in _INFINITE else repr(value) for value in column.tolist()]
    return list(map(str, column.tolist()))


_INFINITE = (float("inf"), float("-inf"))
