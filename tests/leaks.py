"""Looks for what must not be in any file that kvhook has written: texts, and runs of token ids in several encodings."""

from __future__ import annotations

import base64
import gzip
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

_BASE64 = re.compile(rb"[A-Za-z0-9+/]{64,}={0,2}")


def contents(folders: Iterable[Path]) -> Iterator[tuple[str, bytes]]:
    """Every file below these folders, as it is and unpacked in every way in which kvhook packs."""
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                data = path.read_bytes()
                yield path.name, path.name.encode()
                yield path.name, data
                yield from ((f"{path.name}, unpacked", more) for more in _unpacked(path, data))


def _unpacked(path: Path, data: bytes) -> Iterator[bytes]:
    if path.suffix == ".gz":
        yield gzip.decompress(data)
    if path.suffix in (".parquet", ".arrow"):
        import pyarrow.ipc
        import pyarrow.parquet

        if path.suffix == ".parquet":
            table = pyarrow.parquet.read_table(path, partitioning=None)
        else:
            table = pyarrow.ipc.open_file(path).read_all()
        yield str(table.schema).encode()
        for name in table.column_names:
            column = table.column(name).to_pylist()
            yield repr(column).encode()
            if column and all(type(value) is int for value in column):
                yield b"".join((value & (1 << 64) - 1).to_bytes(8, "little") for value in column)
    if path.suffix == ".html":
        for found in _BASE64.findall(data):
            packed = base64.b64decode(found + b"=" * (-len(found) % 4))
            try:
                yield zlib.decompress(packed)
            except zlib.error:
                yield packed


def text_patterns(text: str) -> dict[str, bytes]:
    """Ways in which a text could be written."""
    return {
        "utf-8": text.encode(),
        "utf-16": text.encode("utf-16-le"),
        "base64": base64.b64encode(text.encode())[:-4] or text.encode(),
        "hex": text.encode().hex().encode(),
        "capitals": text.upper().encode(),
    }


def token_patterns(ids: Sequence[int]) -> dict[str, bytes]:
    """Ways in which a run of token ids could be written: as numbers of several sizes, and as text."""
    numbers = {kind: np.array(ids, kind).tobytes() for kind in ("<u2", "<u4", "<i8", ">u2", ">u4", ">i8", "<f4", "<f8")}
    texts = {f"joined by {between!r}": between.join(map(str, ids)).encode() for between in (", ", ",", " ", "\n", "-")}
    return numbers | texts


def leaks(folders: Iterable[Path], patterns: dict[str, bytes]) -> list[str]:
    """Where one of the patterns was found."""
    return [
        f"{where}: {what}"
        for where, data in contents(folders)
        for what, pattern in patterns.items()
        if pattern and pattern in data
    ]
