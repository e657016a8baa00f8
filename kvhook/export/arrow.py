"""Apache Parquet and Arrow files: typed columns, null for what is not known, and the facts about the run in the schema.

Each table is a file: ``run.parquet`` holds the steps, ``run.requests.parquet`` the finished requests, and so on; see
`kvhook.export.contents.TABLES`. Of the schema's metadata ``kvhook`` is the run's ``meta`` as JSON and ``kvhook.table``
the name of the table; each column has its ``unit``, ``role`` and ``meaning``.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from kvhook.core_schema import BLOCK_EVENT_FIELDS, BLOCK_EVENT_TIMES, CORE_KINDS
from kvhook.errors import ExportError
from kvhook.export.contents import FRONT, TABLES, beside, core_tables, empty, front_tables
from kvhook.export.unknown import unknown
from kvhook.files import Opener
from kvhook.records.columns import Table
from kvhook.records.core import CoreRecords
from kvhook.records.tables import Records
from kvhook.schema import KINDS, TIME

#: Rows that are written together, a row group of a Parquet file: some 20 MB of steps.
GROUP = 1 << 16

_ABOUT = {
    kind: {f.name: {"unit": f.unit, "role": f.role, "meaning": f.meaning} for f in fields}
    for kind, (_, fields) in {**KINDS, **CORE_KINDS}.items()
} | {
    "blocks": {
        name: {"meaning": meaning}
        for name, meaning in [*((name, meaning) for name, _, meaning in BLOCK_EVENT_FIELDS), *BLOCK_EVENT_TIMES.items()]
    }
}


def write_parquet(records: Records, path: Path, opener: Opener, cores: CoreRecords | None) -> None:
    """One Parquet file per table, compressed with zstd."""
    _write(records, cores, lambda kind: opener(beside(path, kind)), parquet_writer(path))


def write_arrow(records: Records, path: Path, opener: Opener, cores: CoreRecords | None) -> None:
    """One file in Arrow's IPC format per table; it can be mapped into memory."""
    _write(records, cores, lambda kind: opener(beside(path, kind)), _ipc(path))


def pyarrow(path: Path) -> Any:
    """The library.

    Raises:
        ExportError: it is not installed.
    """
    try:
        import pyarrow as pa
    except ImportError:
        raise ExportError(f'{path.name} needs pyarrow, which is not installed: pip install "kvhook[arrow]"') from None
    return pa


#: Makes the writer of a file: it has ``write_table`` and ``close``.
MakeWriter = Callable[[IO[bytes], Any], Any]


def parquet_writer(path: Path) -> MakeWriter:
    """Makes writers of Parquet files; `path` is named if they cannot be had."""
    pyarrow(path)
    import pyarrow.parquet as pq

    return lambda file, schema: pq.ParquetWriter(file, schema, compression="zstd")


def _ipc(path: Path) -> MakeWriter:
    pa = pyarrow(path)
    return lambda file, schema: pa.ipc.new_file(file, schema)


class TableFile:
    """A file of one table, written a group of rows at a time.

    Args:
        file: where it is written.
        make: makes the library's writer.
        kind: of its records.
        first: rows, or none, that have the columns of all that come.
        facts: what goes into the schema's metadata.
        leave_out: columns that are not written.
    """

    def __init__(
        self,
        file: IO[bytes],
        make: MakeWriter,
        kind: str,
        first: Table,
        facts: Mapping[str, str],
        leave_out: Iterable[str] = (),
    ) -> None:
        self._kind = kind
        self._names = [name for name in first.dtype.names or () if name not in set(leave_out)]
        self._schema = _schema(kind, first, self._names, facts)
        self._writer = make(file, self._schema)
        self._waiting: list[Table] = []
        self._rows = 0

    def take(self, table: Table) -> None:
        """Write rows, or keep them until there are enough."""
        self._waiting.append(table)
        self._rows += len(table)
        if self._rows >= GROUP:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        table = np.concatenate(self._waiting) if len(self._waiting) != 1 else self._waiting[0]
        self._waiting, self._rows = [], 0
        masks = unknown(table, self._kind)
        columns = [_column(table[name], masks.get(name), self._schema.field(name).type) for name in self._names]
        self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema), GROUP)

    def close(self) -> None:
        """Write what is left, and the end of the file."""
        if self._waiting:
            self._flush()
        self._writer.close()

    def abandon(self) -> None:
        """Let go of the file, which will be deleted. Else the library would complain when it is collected."""
        with contextlib.suppress(Exception):
            self._writer.close()


def _column(values: Any, mask: Any, kind: Any) -> Any:
    import pyarrow as pa

    if values.dtype.kind == "U":
        return pa.array(values.tolist(), kind, mask=mask)
    return pa.array(np.ascontiguousarray(values), kind, mask=mask)


def _schema(kind: str, table: Table, names: Iterable[str], facts: Mapping[str, str]) -> Any:
    import pyarrow as pa

    about = _ABOUT.get(kind, {})
    fields = []
    for name in names:
        dtype = table.dtype[name]
        is_what = pa.string() if dtype.kind == "U" else pa.from_numpy_dtype(dtype)
        clock = about.get(name.replace("_unix_ns", "_ns"), {})
        since = {"unit": "ns", "role": TIME, "meaning": f"since 1970: {clock.get('meaning', '')}"}
        fields.append(pa.field(name, is_what, metadata=about.get(name) or (since if clock else None)))
    return pa.schema(fields, metadata={"kvhook.table": TABLES[kind], **facts})


def run_facts(records: Records) -> dict[str, str]:
    """What the schema of the front end's tables says of the run."""
    return {"kvhook": json.dumps(records.meta, default=str)}


def core_facts(records: Records, cores: CoreRecords) -> dict[str, str]:
    """The same of the engine cores' tables: what is known of each core too, and which columns it has not."""
    return {**run_facts(records), "kvhook.cores": json.dumps(cores.told(), default=str)}


def _write(records: Records, cores: CoreRecords | None, file: Callable[[str], IO[bytes]], make: MakeWriter) -> None:
    facts = run_facts(records)
    with completed() as opened:
        for kind in FRONT:
            opened[kind] = TableFile(file(kind), make, kind, empty(records, kind), facts)
        for kind, table in front_tables(records):
            opened[kind].take(table)
        if cores is not None:
            for kind, table in core_tables(cores):
                opened[kind] = TableFile(file(kind), make, kind, table, core_facts(records, cores))
                opened[kind].take(table)


@contextlib.contextmanager
def completed() -> Iterator[dict[Any, TableFile]]:
    """Holds files and completes them at the end of the block; if it raises they are only closed."""
    files: dict[Any, TableFile] = {}
    try:
        yield files
        for file in files.values():
            file.close()
    except BaseException:
        for file in files.values():
            file.abandon()
        raise
