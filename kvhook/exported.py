"""Opens what kvhook has exported: Parquet, Arrow and JSON lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kvhook.errors import KvhookError, TraceFormatError
from kvhook.export.arrow import beside
from kvhook.export.contents import TABLES
from kvhook.records.imported import Exported

#: The tables of a run, by the kind of their records.
_KINDS = ("step", "request", "latency")


def _read_arrow(path: Path) -> Any:
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


def _read_parquet(path: Path) -> Any:
    import pyarrow.parquet as pq

    # a ParquetFile and not read_table: the name of a folder above is no column of it
    with pq.ParquetFile(path) as file:
        return file.read()


def is_beside(path: Path) -> bool:
    """Whether a file holds another table than the steps of a run: ``run.requests.parquet``."""
    name, _, table = path.stem.rpartition(".")
    return path.suffix in READERS and bool(name) and table in TABLES.values()


def _columnar(path: Path, read: Callable[[Path], Any]) -> Exported:
    try:
        import pyarrow
    except ImportError:
        raise KvhookError(f'{path} needs pyarrow, which is not installed: pip install "kvhook[arrow]"') from None
    tables: dict[str, Any] = {}
    for kind in _KINDS:
        file = beside(path, kind)
        if kind != "step" and not file.is_file():
            continue
        try:
            tables[kind] = read(file)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowIOError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise TraceFormatError(f"{file} cannot be read: {str(error).splitlines()[0]}") from None
    meta = (tables["step"].schema.metadata or {}).get(b"kvhook")
    if meta is None:
        raise TraceFormatError(f"{path} was not written by kvhook: its schema has no metadata 'kvhook'")
    step, request, latency = (_columns(tables.get(kind)) for kind in _KINDS)
    return Exported(_meta(meta, path), step, request, latency)


def _columns(table: Any) -> dict[str, Any]:
    if table is None:
        return {}
    return {name: _values(table.column(name)) for name in table.column_names}


def _values(column: Any) -> Any:
    if column.null_count or not _is_number(column):
        return column.to_pylist()
    return column.to_numpy()


def _is_number(column: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_integer(column.type) or pa.types.is_floating(column.type))


def _json_lines(path: Path) -> Exported:
    meta: dict[str, Any] | None = None
    rows: dict[str, list[dict[str, Any]]] = {"step": [], "request": []}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                kind = row.pop("kind")
            except (ValueError, KeyError, AttributeError, RecursionError):
                # a last line that was cut off is left out
                if not line.endswith("\n") and meta is not None:
                    break
                raise TraceFormatError(f"{path}, line {number}, is not one that kvhook has exported") from None
            if kind == "meta":
                meta = row
            elif kind in rows:
                rows[kind].append(row)
    if meta is None:
        raise TraceFormatError(f"{path} was not written by kvhook: it has no line with the facts about the run")
    step, request = (_of_rows(rows[kind]) for kind in ("step", "request"))
    return Exported(_meta(meta, path), step or _no_steps(), request, {})


def _of_rows(rows: list[dict[str, Any]]) -> dict[str, Any]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: np.array([row.get(name) for row in rows], object) for name in names}


def _no_steps() -> dict[str, Any]:
    none = ("engine", "step", "t_start_ns", "t_end_ns", "has_scheduler_stats")
    return {name: np.empty(0, np.int64) for name in none}


def _meta(raw: Any, path: Path) -> dict[str, Any]:
    try:
        meta = raw if isinstance(raw, dict) else json.loads(raw)
    except (ValueError, RecursionError):
        meta = None
    if not isinstance(meta, dict) or not isinstance(meta.get("engines"), list):
        raise TraceFormatError(f"{path} was not written by kvhook: it does not say which engines it is about")
    return meta


#: Suffix -> what reads such a file.
READERS: dict[str, Callable[[Path], Exported]] = {
    ".parquet": lambda path: _columnar(path, _read_parquet),
    ".arrow": lambda path: _columnar(path, _read_arrow),
    ".jsonl": _json_lines,
}
