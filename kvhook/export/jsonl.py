"""JSON lines: one line with the facts about the run, then one line for each row of its tables."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from kvhook.export.cells import columns, tables
from kvhook.export.contents import facts
from kvhook.files import Opener
from kvhook.records.columns import Table
from kvhook.records.core import CoreRecords
from kvhook.records.tables import Records

#: What Python's json writes for what JSON has no number for.
_INFINITE = {"inf": "Infinity", "-inf": "-Infinity"}


def write(records: Records, path: Path, opener: Opener, cores: CoreRecords | None) -> None:
    """Each line is an object with ``kind``: ``meta``, or a kind of record such as ``step`` or ``request``; see
    `kvhook.export.contents.TABLES`. Unknown values are null."""
    file = opener(path)
    file.write(json.dumps({"kind": "meta", **facts(records, cores)}, default=str).encode() + b"\n")
    for kind, table in tables(records, cores):
        file.write(_lines(table, kind))


def _text(value: str) -> str:
    return _INFINITE.get(value) or json.dumps(value)


def _lines(table: Table, kind: str) -> bytes:
    """The rows of a table. What is the same in all rows, keys among it, is in the text of a formatted string; compiled,
    that is the fastest way to put rows together."""
    texts, cells = [f'{{"kind": "{kind}"'], []
    for name, column in columns(table, kind, "null", _text):
        texts[-1] += f', "{name}": '
        if isinstance(column, str):
            texts[-1] += column
        else:
            cells.append(column)
            texts.append("")
    texts[-1] += "}\n"
    if not cells:
        return (texts[0] * len(table)).encode()
    return _formatter(tuple(texts))(zip(*cells, strict=True)).encode()


@functools.lru_cache(64)
def _formatter(texts: tuple[str, ...]) -> Callable[[Iterable[tuple[str, ...]]], str]:
    """A function that puts the cells of each row between these texts."""
    names = [f"c{i}" for i in range(len(texts) - 1)]
    body = texts[0].translate(_QUOTED) + "".join(
        f"{{{name}}}{text.translate(_QUOTED)}" for name, text in zip(names, texts[1:], strict=True)
    )
    function: Callable[[Iterable[tuple[str, ...]]], str]
    function = eval(f"lambda rows: ''.join([f'{body}' for {', '.join(names)}, in rows])")
    return function


#: What must not stand as it is in a formatted string.
_QUOTED = str.maketrans({"{": "{{", "}": "}}", "'": "\\'", "\\": "\\\\", "\n": "\\n"})
