"""Opens what kvhook has exported: Parquet, Arrow, CSV and JSON lines; and folders of many runs."""

from __future__ import annotations

import contextlib
import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kvhook.core_schema import BLOCK_EVENT_FIELDS, CORE_KINDS
from kvhook.errors import KvhookError, TraceFormatError
from kvhook.export.contents import TABLES, beside
from kvhook.export.csv import facts_beside
from kvhook.export.latencies import TYPES
from kvhook.facts import printable
from kvhook.records.imported import Columns, Exported
from kvhook.records.text_lines import LONGEST, lines_of
from kvhook.ring.place import open_regular
from kvhook.schema import KINDS

#: Kind of record -> the columns that are text in an export.
_TEXTS = {kind: {f.name for f in fields if f.type == "enum"} for kind, (_, fields) in {**KINDS, **CORE_KINDS}.items()}
_TEXTS["request"] |= {"label", "lora_name"}
_TEXTS |= {"latency": {"series"}, "blocks": {"event"}}
#: The same of numbers with a fraction.
_FLOATS = {
    kind: {f.name for f in fields if f.type == "f8"} for kind, (_, fields) in {**KINDS, **CORE_KINDS}.items()
} | {"latency": {name for name, dtype in TYPES if dtype == "<f8"}}
_UNSIGNED = {name for name, dtype, _ in BLOCK_EVENT_FIELDS if dtype == "<u8"}
#: The columns that are looked at.
_KNOWN = frozenset(
    {f.name for _, fields in (*KINDS.values(), *CORE_KINDS.values()) for f in fields}
    | {name for name, *_ in (*TYPES, *BLOCK_EVENT_FIELDS)}
    | {"engine", "core"}
)
_FEW_ROWS = 1 << 16


def is_beside(path: Path) -> bool:
    """Whether a file holds another table than the steps of a run: ``run.requests.parquet``."""
    name, _, table = path.stem.rpartition(".")
    return path.suffix in READERS and bool(name) and table in TABLES.values()


# ---- Parquet and Arrow ---------------------------------------------------------------------------------------------


def _read_arrow(path: Path) -> Any:
    import pyarrow as pa

    os.close(open_regular(path))  # pyarrow would wait for a pipe
    with pa.memory_map(str(path)) as file:
        reader = pa.ipc.open_file(file)
        known = [i for i, name in enumerate(reader.schema.names) if name in _KNOWN]
        reader = pa.ipc.open_file(file, options=pa.ipc.IpcReadOptions(included_fields=known))
        rows, batches = 0, []
        for number in range(min(reader.num_record_batches, path.stat().st_size)):
            batches.append(reader.get_batch(number))
            rows += batches[-1].num_rows
            _check_rows(path, rows)
        return pa.Table.from_batches(batches, reader.schema)


def _read_parquet(path: Path) -> Any:
    import pyarrow.parquet as pq

    os.close(open_regular(path))  # pyarrow would wait for a pipe
    # a ParquetFile and not read_table: the name of a folder above is no column of it
    with pq.ParquetFile(path) as file:
        _check_rows(path, file.metadata.num_rows)
        return file.read(columns=[name for name in file.schema_arrow.names if name in _KNOWN])


def _check_rows(path: Path, rows: int) -> None:
    """No allocation follows a count in a file further than its length: each row has clock readings of its own."""
    if rows > max(_FEW_ROWS, 4 * path.stat().st_size):
        raise TraceFormatError(f"{path} says that it holds {rows:,} rows, which do not fit into it")


def read_tables(files: Mapping[str, Path], read: Callable[[Path], Any]) -> tuple[Exported, dict[str, str]]:
    """The tables of some files, kind of record -> file, and what the first of them says about itself.

    Raises:
        KvhookError: pyarrow is not installed.
        TraceFormatError: a file is damaged, or was written by somebody else.
    """
    first = files["step"]
    try:
        import pyarrow
    except ImportError:
        raise KvhookError(f'{first} needs pyarrow, which is not installed: pip install "kvhook[arrow]"') from None
    tables: dict[str, Any] = {}
    for kind, file in files.items():
        try:
            tables[kind] = read(file)
            # Arrow believes what a file says of where texts begin, and would read elsewhere in memory
            tables[kind].validate(full=True)
        except (pyarrow.ArrowException, OSError, ValueError, TypeError, KeyError, OverflowError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            if isinstance(error, PermissionError):
                raise
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise TraceFormatError(f"{file} cannot be read: {printable(why)[:300]}") from None
    told = {key.decode(): text.decode() for key, text in (tables["step"].schema.metadata or {}).items()}
    if "kvhook" not in told:
        raise TraceFormatError(f"{first} was not written by kvhook: its schema has no metadata 'kvhook'")
    cores = next(
        (m[b"kvhook.cores"] for t in tables.values() if b"kvhook.cores" in (m := t.schema.metadata or {})), b"null"
    )
    columns = {
        kind: {name: _values(table.column(name)) for name in table.column_names} for kind, table in tables.items()
    }
    return Exported(_meta(told["kvhook"], first), columns, _json(cores)), told


def _columnar(path: Path, read: Callable[[Path], Any]) -> Exported:
    files = {kind: file for kind in TABLES if (file := beside(path, kind)).is_file() or kind == "step"}
    exported, told = read_tables(files, read)
    if "kvhook.engine" not in told:
        return exported
    # a file of a folder of many runs: its engine is in the name of its folder
    steps = exported.tables["step"]
    return exported._replace(tables={"step": with_number(steps, "engine", _number(told["kvhook.engine"]))})


@contextlib.contextmanager
def exported_by_kvhook(path: Path) -> Iterator[None]:
    """What a file makes fail that kvhook has not written, or that was changed since, is an error of that file.

    Raises:
        TraceFormatError: something failed.
    """
    try:
        yield
    except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RecursionError, MemoryError) as error:
        why = printable(f"{type(error).__name__}: {error}")[:300]
        raise TraceFormatError(f"{path} is not as kvhook exports it: {why}") from None


def _values(column: Any) -> Any:
    if column.null_count or not _is_number(column):
        return column.to_pylist()
    return column.to_numpy()


def _is_number(column: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_integer(column.type) or pa.types.is_floating(column.type))


def with_number(columns: Columns, name: str, number: int) -> Columns:
    """A table with a column more, which is the same in all rows."""
    rows = max((len(values) for values in columns.values()), default=0)
    return {name: np.full(rows, number), **columns}


def _number(text: str) -> int:
    return int(text) if text.isdecimal() and len(text) < 9 else 0


# ---- lines of text -------------------------------------------------------------------------------------------------


def _json_lines(path: Path) -> Exported:
    meta: dict[str, Any] | None = None
    rows: dict[str, list[dict[str, Any]]] = {kind: [] for kind in TABLES}
    with open(open_regular(path), encoding="utf-8") as file:
        for number, line in enumerate(lines_of(file, path), 1):
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
    tables = {kind: _of_rows(some) for kind, some in rows.items() if some}
    tables.setdefault("step", _no_steps())
    return Exported(_meta(meta, path), tables, meta.get("cores"))


def _of_rows(rows: list[dict[str, Any]]) -> dict[str, Any]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: np.array([row.get(name) for row in rows], object) for name in names}


def _no_steps() -> dict[str, Any]:
    none = ("engine", "step", "t_start_ns", "t_end_ns", "has_scheduler_stats")
    return {name: np.empty(0, np.int64) for name in none}


def _csv(path: Path) -> Exported:
    tables = {
        kind: _read_csv(file, kind) for kind in TABLES if (file := beside(path, kind)).is_file() or kind == "step"
    }
    told: Any = {"engines": []}
    facts = facts_beside(path)
    if facts.is_file():
        with open(open_regular(facts), "rb") as beginning:
            raw = beginning.read(LONGEST + 1)
        if len(raw) > LONGEST:
            raise TraceFormatError(f"{facts} is longer than {LONGEST >> 20} MiB, which no such file of kvhook's is")
        told = _meta(_json(raw), facts)
    return Exported(told, tables, told.get("cores"))


def _read_csv(path: Path, kind: str) -> dict[str, Any]:
    try:
        with open(open_regular(path), encoding="utf-8", newline="") as file:
            rows = iter(csv.reader(lines_of(file, path)))
            names = next(rows, [])
            # a last line that was cut off is left out
            columns = list(zip(*(row for row in rows if len(row) == len(names)), strict=True)) or [()] * len(names)
    except (UnicodeDecodeError, csv.Error) as error:
        raise TraceFormatError(f"{path} is not a table that kvhook has exported: {error}") from None
    try:
        return {name: _parsed(cells, kind, name) for name, cells in zip(names, columns, strict=True)}
    except ValueError as error:
        raise TraceFormatError(f"{path} is not a table that kvhook has exported: {error}") from None


def _parsed(cells: Iterable[str], kind: str, name: str) -> Any:
    """A column of text as what it holds; None, or NaN, where nothing stands."""
    if name in _TEXTS.get(kind, ()):
        return list(cells)
    if name in _FLOATS.get(kind, ()):
        return np.array([cell or "nan" for cell in cells], np.float64)
    if name in _UNSIGNED:
        return np.array(list(map(int, cells)), np.uint64)
    cells = list(cells)
    return [int(cell) if cell else None for cell in cells] if "" in cells else np.array(list(map(int, cells)), np.int64)


def _json(raw: Any) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def _meta(raw: Any, path: Path) -> dict[str, Any]:
    meta = raw if isinstance(raw, dict) else _json(raw) if raw is not None else None
    if not isinstance(meta, dict) or not isinstance(meta.get("engines"), list):
        raise TraceFormatError(f"{path} was not written by kvhook: it does not say which engines it is about")
    return meta


# ---- folders of many runs ------------------------------------------------------------------------------------------


def runs_in(folder: Path) -> list[Path]:
    """The folders of single runs, ``run=NAME``, in a folder of many; the folder itself if it is one."""
    if folder.name.startswith("run=") and _engines_in(folder):
        return [folder]
    return sorted(run for run in folder.glob("run=*") if run.is_dir() and _engines_in(run))


def _engines_in(run: Path) -> list[Path]:
    return sorted(run.glob("engine=*/steps.parquet"), key=lambda path: _number(path.parent.name.partition("=")[2]))


def read_run(run: Path) -> tuple[Exported, str]:
    """One run of a folder of many, and its name.

    Raises:
        KvhookError: pyarrow is not installed.
        TraceFormatError: a file is damaged, or was written by somebody else.
    """
    found: list[Exported] = []
    name = run.name
    for steps in [*_engines_in(run), *sorted(run.glob("core=*/core_steps.parquet"))]:
        what, _, number = steps.parent.name.partition("=")
        files = {
            kind: file for kind, table in TABLES.items() if (file := steps.with_name(f"{table}.parquet")).is_file()
        }
        if what == "core":
            files["step"] = files["core_step"]
        exported, told = read_tables(files, _read_parquet)
        tables = {kind: with_number(columns, what, _number(number)) for kind, columns in exported.tables.items()}
        if what == "core":
            del tables["step"]
        found.append(exported._replace(tables=tables))
        name = told.get("kvhook.run", name)
    kinds = dict.fromkeys(kind for one in found for kind in one.tables)
    together = {kind: _stacked([one.tables[kind] for one in found if kind in one.tables]) for kind in kinds}
    cores = next((one.cores for one in found if one.cores), None)
    return Exported(found[0].meta, together, cores), name


def _stacked(tables: list[Columns]) -> Columns:
    """Tables with the same columns below each other."""
    if len(tables) == 1:
        return tables[0]
    out: dict[str, Any] = {}
    for name in tables[0]:
        parts = [table[name] for table in tables if name in table]
        plain = all(isinstance(part, np.ndarray) for part in parts)
        out[name] = np.concatenate(parts) if plain else [value for part in parts for value in part]
    return out


#: Suffix -> what reads such a file.
READERS: dict[str, Callable[[Path], Exported]] = {
    ".parquet": lambda path: _columnar(path, _read_parquet),
    ".arrow": lambda path: _columnar(path, _read_arrow),
    ".csv": _csv,
    ".jsonl": _json_lines,
}
