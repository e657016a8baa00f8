"""Files as somebody might forge them: bytes changed anywhere, or other values with all checksums right."""

from __future__ import annotations

import contextlib
import io
import json
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

#: Numbers and other values that no kvhook has written there.
WORDS = [0, 1, 2, 255, 1 << 31, 1 << 32, 1 << 40, (1 << 62) - 1, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
FLOATS = [float("nan"), float("inf"), float("-inf"), -0.0, 5e-324, 1.7e308, -1.7e308]
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 1 << 31, 1 << 40, 1 << 62, -(1 << 63), 1 << 64, 10**30),
    *(float("nan"), float("inf"), -1e308, 1.5),
    *("", "x", "\x1b[2J", "../../../etc/passwd", "/etc/passwd", "é" * 300, "\ud800", "1e9", "nan"),
    *([], [1], [[1, 2], [3]], {}, {"a": 1}, [None, "x"], {"x": {"x": {"x": []}}}),
]


def forge(name: str, data: bytes, r: random.Random) -> bytes:
    """A file like this one in which something is not as it should be."""
    known: list[Callable[[bytes, random.Random], bytes]] = [_bytes]
    if name.endswith(".kvh"):
        known += [_fields, _fields, _facts, _facts] if not name.startswith("packed") else [_frames]
    if name.endswith(".jsonl"):
        known += [_lines] * 4
    if name.endswith((".parquet", ".arrow")):
        known += [lambda data, r: _columns(name, data, r)] * 4
    for _ in range(r.choice((1, 1, 1, 2, 4))):
        data = r.choice(known)(data, r)
    return data


def _bytes(data: bytes, r: random.Random) -> bytes:
    from kvhook.ring.layout import MAGIC, seal

    out = bytearray(data)
    for _ in range(r.choice((1, 1, 3, 20))):
        at = int(len(out) * r.random() ** r.choice((1, 4)))  # often near the beginning
        how = r.randrange(5)
        if how == 0 and out:
            out[min(at, len(out) - 1)] ^= 1 << r.randrange(8)
        elif how == 1 and len(out) >= 8:
            struct.pack_into("<Q", out, min(at // 8 * 8, len(out) // 8 * 8 - 8), r.choice(WORDS))
        elif how == 2:
            del out[at:]
        elif how == 3:
            out[at:at] = out[at : at + r.randrange(300)]
        else:
            out[at : at + 200] = r.randbytes(len(out[at : at + 200]))
    if out[:8] == MAGIC and len(out) > 128 and r.random() < 0.7:
        return seal(out)
    return bytes(out)


def _fields(data: bytes, r: random.Random) -> bytes:
    """Numbers in records, which carry no checksum in a trace."""
    from kvhook.errors import KvhookError
    from kvhook.ring.layout import FIELDS_AT, parse_header

    with contextlib.suppress(KvhookError):
        header = parse_header(data, len(data), "x")
        slot, first = header.layout.slot_bytes, header.header_bytes
        count = (len(data) - first) // slot
        out = bytearray(data)
        column = FIELDS_AT + 8 * r.randrange((slot - FIELDS_AT) // 8)
        value = struct.pack("<Q", r.choice(WORDS)) if r.random() < 0.6 else struct.pack("<d", r.choice(FLOATS))
        if count:
            which = range(count) if r.random() < 0.3 else [r.randrange(count) for _ in range(r.choice((1, 5)))]
            for i in which:
                at = first + i * slot
                if out[at + 24] != 4 or r.random() < 0.1:  # pieces of facts have a crc
                    out[at + column : at + column + 8] = value
        return bytes(out)
    return data


def _facts(data: bytes, r: random.Random) -> bytes:
    """Facts about engines, with their checksums: in the header, or behind everything else."""
    from kvhook.errors import KvhookError
    from kvhook.ring.layout import FIXED, SCHEMA_AT, parse_header, seal
    from kvhook.ring.trace_file import pack_meta

    with contextlib.suppress(KvhookError, ValueError, TypeError, KeyError):
        header = parse_header(data, len(data), "x")
        size = FIXED.unpack(data[: FIXED.size])[8]
        facts = json.loads(data[SCHEMA_AT : SCHEMA_AT + size])
        if r.random() < 0.5:
            changed = json.dumps(_changed(facts, r)).encode()
            if len(changed) > header.header_bytes - SCHEMA_AT:
                return data
            out = bytearray(data)
            out[SCHEMA_AT : header.header_bytes] = changed.ljust(header.header_bytes - SCHEMA_AT, b"\0")
            struct.pack_into("<2Q", out, 64, len(changed), zlib.crc32(changed))
            return seal(out)
        from kvhook.schema import FACT_FIELDS

        names = [f.name for f in FACT_FIELDS] + ["ring", "session", "kv_groups", "core_level", "token_budget", "stream"]
        new = {r.choice(names): r.choice(VALUES) for _ in range(r.choice((1, 3)))}
        if r.random() < 0.4:
            new["events"] = [_event(r) for _ in range(r.randrange(6))]
        engine = r.choice((0, 0, 0, 1, 7, (1 << 31) - 1, -1))
        whole = len(data) - (len(data) - header.header_bytes) % header.layout.slot_bytes
        return data[:whole] + pack_meta(header.layout, engine, new).tobytes()
    return data


def _event(r: random.Random) -> list[Any]:
    made: list[Any] = r.choice(
        [
            ["scope", 0, "a", "scope", -1, 5, False, [], 1, ""],
            ["scope", r.randrange(5), "b", "generate", r.randrange(5), 7, True, [0], -1, "n=1"],
            ["end", 0, 9],
            ["name", "label", 0, "a"],
            ["request", 0, 5, "ff", 0, -1],
            ["clock", 5, 10**18],
        ]
    )
    return [r.choice(VALUES) if i and r.random() < 0.2 else cell for i, cell in enumerate(made)]


def _changed(value: Any, r: random.Random) -> Any:
    """The same JSON with another value somewhere."""
    if isinstance(value, dict) and value and r.random() < 0.95:
        key = r.choice(sorted(value))
        if r.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: _changed(value[key], r)}
    if isinstance(value, list) and value and r.random() < 0.9:
        at = r.randrange(len(value))
        if r.random() < 0.2:
            return value[:at] + value[at + 1 :] if r.random() < 0.5 else [*value, value[at]]
        return [*value[:at], _changed(value[at], r), *value[at + 1 :]]
    return r.choice(VALUES)


def _frames(data: bytes, r: random.Random) -> bytes:
    """A frame that holds more than it says, or another number of slots, with its checksums right."""
    from kvhook.ring import frames

    at = data.find(frames.MAGIC)
    if at < 0:
        return data
    slots = r.choice((0, 1, 30, 8192, 1 << 16))
    method = r.choice((1, 2, 2, 3))
    size = r.choice((0, 64, 1 << 14, 1 << 20, 1 << 26))
    raw = bytes(size) if r.random() < 0.7 else r.randbytes(min(size, 1 << 16))
    payload = zlib.compress(raw)
    if method == 2 and frames.zstandard is not None:
        payload = frames.zstandard.ZstdCompressor().compress(raw)
    head = struct.pack("<8s4I", frames.MAGIC, slots, len(payload), method, zlib.crc32(payload))
    head += bytes(frames._CHECKED - len(head))
    return data[:at] + head + struct.pack("<2I", zlib.crc32(head), 0) + payload


def _lines(data: bytes, r: random.Random) -> bytes:
    lines = data.splitlines()
    for _ in range(r.choice((1, 1, 4))):
        if not lines:
            break
        at = r.choice((0, r.randrange(len(lines))))
        how = r.randrange(6)
        with contextlib.suppress(ValueError, RecursionError):
            if how == 0:
                lines[at] = json.dumps(r.choice(VALUES)).encode()
            elif how == 1:
                lines[at] = b"[" * 3000
            elif how == 2:
                del lines[at]
            else:
                lines[at] = json.dumps(_changed(json.loads(lines[at]), r)).encode()
    return b"\n".join(lines) + b"\n" * r.randrange(2)


def _columns(name: str, data: bytes, r: random.Random) -> bytes:
    """A table with a column of other values, or of another type, or without one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    source = pa.BufferReader(data)
    try:
        table = pq.read_table(source) if name.endswith(".parquet") else pa.ipc.open_file(source).read_all()
        meta = dict(table.schema.metadata or {})
        for _ in range(r.choice((1, 1, 3))):
            at = r.randrange(table.num_columns)
            field = table.schema.names[at]
            how = r.randrange(5)
            value = r.choice(VALUES)
            if how == 0:
                table = table.remove_column(at)
            elif how == 1:
                table = table.set_column(at, field, pa.array([value] * len(table)))
            elif how == 2:
                values = table.column(at).to_pylist()
                values[r.randrange(len(values))] = value
                table = table.set_column(at, field, pa.array(values))
            elif how == 3 and b"kvhook" in meta:
                meta[b"kvhook"] = json.dumps(_changed(json.loads(meta[b"kvhook"]), r)).encode()
            else:
                table = pa.concat_tables([table] * r.choice((0, 2, 3))) if r.random() < 0.5 else table.slice(0, 0)
        table = table.replace_schema_metadata(meta)
        sink = io.BytesIO()
        if name.endswith(".parquet"):
            pq.write_table(table, sink)
        else:
            with pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
        return sink.getvalue()
    except (pa.ArrowException, ValueError, TypeError, OverflowError, IndexError, KeyError, OSError):
        return data
