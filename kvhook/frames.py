"""Tables of a run for other libraries: pandas, Polars, Arrow. Each is asked for when it is needed."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from kvhook.errors import KvhookError
from kvhook.export.contents import TABLES
from kvhook.export.unknown import unknown
from kvhook.records.columns import Table
from kvhook.records.core import CoreRecords

_KINDS = {TABLES[kind]: kind for kind in TABLES if kind != "latency"}


class Tables(Protocol):
    """What has the tables of a run, by their names."""

    def steps(self) -> Table:
        """The front end's steps."""

    def requests(self) -> Table:
        """Its requests."""

    def cores(self) -> CoreRecords:
        """What engine cores recorded."""


def table_of(records: Tables, table: str) -> tuple[Table, dict[str, Any]]:
    """A table, and in which rows a column's value is not known.

    Raises:
        KvhookError: there is no such table.
    """
    if table not in _KINDS:
        raise KvhookError(f"there is no table {table!r}; there are {', '.join(map(repr, _KINDS))}")
    if table in ("steps", "requests"):
        rows = records.steps() if table == "steps" else records.requests()
    else:
        cores = records.cores()
        rows = getattr(cores, table.removeprefix("core_"))()
    return rows, unknown(rows, _KINDS[table])


def to_pandas(records: Tables, table: str) -> Any:
    """A ``pandas.DataFrame``, see `kvhook.Trace.to_pandas`."""
    pandas = _library("pandas", "pandas")
    rows, masks = table_of(records, table)
    columns: dict[str, Any] = {}
    for name in rows.dtype.names or ():
        values, mask = np.ascontiguousarray(rows[name]), masks.get(name)
        if values.dtype.kind == "U":
            columns[name] = pandas.array(values.tolist(), dtype="str")
        elif values.dtype.kind == "i" and mask is not None:
            columns[name] = pandas.arrays.IntegerArray(values, mask)
        else:
            columns[name] = values if mask is None else np.where(mask, np.nan, values)
    return pandas.DataFrame(columns)


def to_arrow(records: Tables, table: str) -> Any:
    """A ``pyarrow.Table``, see `kvhook.Trace.to_arrow`."""
    pa = _library("pyarrow", "arrow")
    rows, masks = table_of(records, table)
    columns = {}
    for name in rows.dtype.names or ():
        values = rows[name].tolist() if rows[name].dtype.kind == "U" else np.ascontiguousarray(rows[name])
        columns[name] = pa.array(values, mask=masks.get(name))
    return pa.table(columns)


def to_polars(records: Tables, table: str) -> Any:
    """A ``polars.DataFrame``, see `kvhook.Trace.to_polars`."""
    polars = _library("polars", "polars")
    return polars.from_arrow(to_arrow(records, table))


def _library(name: str, extra: str) -> Any:
    try:
        return __import__(name)
    except ImportError:
        raise KvhookError(f'{name} is not installed: pip install "kvhook[{extra}]"') from None
