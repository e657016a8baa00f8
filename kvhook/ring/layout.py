"""The bytes of a ring file and of a ``.kvh`` trace: constants and checks, nothing else.

::

    header (little endian)
        0  magic "KVHOOK01", stored last when a file is made, checked first when it is read
        8  u64 layout version (major << 32 | minor)     16  u64 slot bytes
       24  u64 capacity in slots, 2^k; 0 in a trace     32  u64 pid of the writer
       40  u64 flags (bit 0: crc)                       48  u64 start time of that process (clock ticks)
       56  u64 schema offset   64  u64 schema bytes     72  u64 crc32 of the schema
       80  u64 monotonic ns    88  u64 realtime ns      both read at the same moment
       96  u64 state: 1 live, 2 closed                 104  u64 header bytes, a multiple of 4096
      112  u64 crc32 of the words above, without the state
      128  u64 head: records published so far, alone in its cache line
      192  u64 what was last done to the engine: engine events so far << 8 | code of its kind
      200  u64 monotonic ns of that
      208  u64 code of the kind that the engine rests by (sleep, pause); 0 if it does not
      216  u64 monotonic ns since when
      256  schema: JSON that names every field with its offset, and the facts about the engine
    slots, from `header bytes` on, each `slot bytes` long (a multiple of 64)
        0  u64 stamp: 2n+1 while record n is being written, 2n+2 when it is whole
        8  u64 crc32 of the body, 0 where the crc is off
       16  i64 n, the record's number      24  i32 kind      28  i32 engine       = start of the body
       32  the record's fields, 8 bytes each: integers first, then floats; zeros to the end of the slot

Why these rules hold (each was measured, x86-64, CPython 3.10 to 3.13):

* the body is one slice store of bytes that were packed in private memory. ``struct``'s packing straight into shared
  memory zeroes its target first: another process read a zero in 22-25 % of reads;
* stamps and head go through ``memoryview.cast("Q")``: one aligned 8-byte ``mov``, which cannot tear;
* every store is its own C call, so the compiler keeps the order, and x86-64 keeps store-store and load-load order.
  ARM64 keeps neither, and Python has no fence: there the crc is on.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from kvhook.core_schema import BLOCKS_KINDS, CORE_KINDS
from kvhook.errors import TraceFormatError
from kvhook.facts import NEEDED_COLUMNS, clean_facts
from kvhook.schema import KINDS, Field, stored

MAGIC = b"KVHOOK01"
MAJOR, MINOR = 1, 0
VERSION = MAJOR << 32 | MINOR
#: The major layout version of compressed traces, see `kvhook.ring.frames`.
COMPRESSED = 2
PAGE = 4096
CACHE_LINE = 64

SCHEMA_AT = 256
FLAG_CRC = 1
LIVE, CLOSED = 1, 2

#: Everything between magic and schema that is written once. The head is not in it: it has its own cache line.
FIXED = struct.Struct("<8s14Q")
#: Where the crc of those words is, the state left out.
SEAL_AT = FIXED.size - 8
#: Offsets of the words that change later, as indices into ``memoryview.cast("Q")``.
STATE_WORD = 96 // 8
HEAD_WORD = 128 // 8
EVENT_WORD, EVENT_TIME_WORD, REST_WORD, REST_TIME_WORD = 192 // 8, 200 // 8, 208 // 8, 216 // 8

#: Slot offsets in bytes.
STAMP_AT, CRC_AT, BODY_AT, FIELDS_AT = 0, 8, 16, 32

#: Kinds of records by name, each with its code and its fields.
Kinds = Mapping[str, tuple[int, tuple[Field, ...]]]
#: What a ring or trace holds, by the ``stream`` that its header names: a front end's records if it names none.
STREAMS: dict[str, Kinds] = {"": KINDS, "core": CORE_KINDS, "blocks": BLOCKS_KINDS}

#: A header larger than this is not ours: no allocation follows a number in a file further than this.
MAX_HEADER = 1 << 20
MAX_SLOT = 1 << 16
MAX_CAPACITY = 1 << 22
#: No record has such a number: a head beyond it is damaged.
MAX_RECORDS = 1 << 61


class Column(NamedTuple):
    """A field's place in the slot: name, numpy type (``<i8``/``<f8``), byte offset, unit, role, and whether it is
    a code that is read as text."""

    name: str
    type: str
    offset: int
    unit: str
    role: str
    enum: bool


class Layout(NamedTuple):
    """How long a slot is, and which columns each kind of record has in it: ``columns[kind]``."""

    slot_bytes: int
    columns: dict[str, tuple[Column, ...]]

    def struct_of(self, kind: str, *, tail: str = "") -> struct.Struct:
        """The packer of one kind: ``n, kind, engine, *fields, *tail``, padded to the whole body of the slot."""
        fields = "".join("d" if c.type == "<f8" else "q" for c in self.columns[kind])
        head = struct.Struct(f"<qii{fields}{tail}")
        return struct.Struct(f"{head.format}{self.slot_bytes - BODY_AT - head.size}x")

    @property
    def values_per_slot(self) -> int:
        """How many float64 fit behind the head of a VALUES record."""
        return (self.slot_bytes - FIELDS_AT) // 8 - len(self.columns["values"])

    @property
    def meta_bytes_per_slot(self) -> int:
        """How many bytes of JSON fit behind the head of a META record."""
        return self.slot_bytes - FIELDS_AT - 8 * len(self.columns["meta"])


class Header(NamedTuple):
    """A checked header. ``meta`` is the schema's JSON without the columns; times in nanoseconds."""

    version: int
    layout: Layout
    capacity: int
    pid: int
    crc: bool
    process_start: int
    monotonic_ns: int
    realtime_ns: int
    state: int
    header_bytes: int
    head: int
    meta: dict[str, Any]

    @property
    def compressed(self) -> bool:
        """Whether frames follow, and not slots."""
        return self.version >> 32 == COMPRESSED


def make_layout(live: dict[str, tuple[Field, ...]], kinds: Kinds = KINDS) -> Layout:
    """Lay out slots that hold the given live fields.

    Args:
        live: per kind of record the fields to store; kinds that are left out get all fields of the schema.
        kinds: the kinds of records, by name, with their fields.
    """
    columns = {}
    for kind, (_, fields) in kinds.items():
        columns[kind] = tuple(
            Column(f.name, "<f8" if f.type == "f8" else "<i8", FIELDS_AT + 8 * i, f.unit, f.role, f.type == "enum")
            for i, f in enumerate(stored(live.get(kind, fields)))
        )
    longest = FIELDS_AT + 8 * max(len(c) for c in columns.values())
    return Layout(-(-longest // CACHE_LINE) * CACHE_LINE, columns)


def pack_header(
    layout: Layout,
    meta: dict[str, Any],
    *,
    capacity: int,
    pid: int,
    process_start: int,
    clocks: tuple[int, int],
    crc: bool,
    version: int = VERSION,
) -> bytes:
    """The whole header as bytes, magic included, padded to its pages; the state is live and the head 0.

    Args:
        meta: JSON-able facts; ``meta["kvhook"]`` is the version that writes.
        clocks: monotonic and realtime nanoseconds of one moment.
        version: of the layout.

    Raises:
        ValueError: the facts are too long for a header.
    """
    schema = dict(meta)
    schema["columns"] = {kind: [list(c) for c in cols] for kind, cols in layout.columns.items()}
    text = json.dumps(schema, default=str).encode()
    header_bytes = -(-(SCHEMA_AT + len(text)) // PAGE) * PAGE
    if header_bytes > MAX_HEADER:
        raise ValueError(f"the description of this engine takes {len(text)} bytes, more than a header may hold")
    fixed = FIXED.pack(
        MAGIC,
        version,
        layout.slot_bytes,
        capacity,
        pid,
        FLAG_CRC if crc else 0,
        process_start,
        SCHEMA_AT,
        len(text),
        zlib.crc32(text),
        *clocks,
        LIVE,
        header_bytes,
        0,
    )
    return seal((fixed.ljust(SCHEMA_AT, b"\0") + text).ljust(header_bytes, b"\0"))


def seal(data: bytes | bytearray) -> bytes:
    """The same header with the right crc over its words."""
    state = 8 * STATE_WORD
    crc = zlib.crc32(bytes(data[:state]) + bytes(data[state + 8 : SEAL_AT]))
    return bytes(data[:SEAL_AT]) + struct.pack("<Q", crc) + bytes(data[SEAL_AT + 8 :])


def parse_header(data: bytes | memoryview, file_bytes: int, name: str) -> Header:
    """Read and check a header.

    Args:
        data: the beginning of the file: `MAX_HEADER` bytes, or all of it if it is shorter.
        file_bytes: length of the whole file; no number in the header is believed beyond it.
        name: what to call the file in errors.

    Raises:
        TraceFormatError: it is no such file, another version wrote it, or its header is damaged; the message says
            which, and what to do.
    """
    if len(data) < SCHEMA_AT or file_bytes < SCHEMA_AT:
        raise TraceFormatError(f"{name} is too short for a kvhook file ({file_bytes} bytes): it holds no header")
    fixed = bytes(data[: FIXED.size])
    magic, version, slot, cap, pid, flags, start, at, size, crc, mono, real, state, header_bytes, _ = FIXED.unpack(
        fixed
    )
    if magic != MAGIC:
        raise TraceFormatError(f"{name} is not a kvhook ring or trace: it does not begin with {MAGIC.decode()}")
    fits = SCHEMA_AT <= at <= at + size <= header_bytes <= min(file_bytes, MAX_HEADER, len(data))
    text = bytes(data[at : at + size]) if fits else b""
    intact = fits and zlib.crc32(text) == crc
    if version >> 32 != MAJOR and (cap or version >> 32 != COMPRESSED):
        reads = f"layout {MAJOR}" if cap else f"layout {MAJOR} and compressed traces of layout {COMPRESSED}"
        raise TraceFormatError(
            f"{name} was written by {_writer(text) if intact else 'another kvhook'} in layout {version >> 32}; this "
            f"one reads {reads}. Open it with that kvhook, or export it there: kvhook export FILE out.csv"
        )
    broken = TraceFormatError(f"{name}: the header is damaged, so its records cannot be read")
    if fixed != seal(fixed):
        raise broken
    if header_bytes <= MAX_HEADER and file_bytes < header_bytes + cap * slot:
        raise TraceFormatError(
            f"{name} is cut short: {file_bytes} of at least {header_bytes + cap * slot} bytes are there"
        )
    if not intact or header_bytes % PAGE or cap > MAX_CAPACITY or (cap and (cap < 2 or cap & (cap - 1))):
        raise broken
    if not FIELDS_AT < slot <= MAX_SLOT or slot % CACHE_LINE:
        raise broken
    try:
        facts = json.loads(text)
        kinds = STREAMS[facts.get("stream", "")]
        columns = {str(kind): _columns(str(kind), cells, slot, kinds) for kind, cells in facts.pop("columns").items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise broken from None
    if not columns.keys() >= kinds.keys():
        raise broken
    (head,) = struct.unpack_from("<Q", data, 8 * HEAD_WORD)
    return Header(
        version,
        Layout(slot, columns),
        cap,
        pid,
        bool(flags & FLAG_CRC),
        start,
        mono,
        real,
        state,
        header_bytes,
        head,
        clean_facts(facts),
    )


def _writer(schema: bytes) -> str:
    try:
        return f"kvhook {str(json.loads(schema)['kvhook'])[:40]}"
    except (ValueError, LookupError, TypeError, RecursionError):
        return "another kvhook"


def _columns(kind: str, cells: Any, slot_bytes: int, kinds: Kinds) -> tuple[Column, ...]:
    """The columns of a kind of record as a header names them; ValueError if a reader could stumble over them."""
    columns = tuple(_column(c, slot_bytes) for c in cells)
    names, offsets = [c.name for c in columns], [c.offset for c in columns]
    if len(set(names)) < len(names) or len(set(offsets)) < len(offsets):
        raise ValueError(kind)
    known = {f.name: f for f in kinds[kind][1]} if kind in kinds else {}
    for c in columns:
        f = known.get(c.name)
        if f and (c.type, c.enum) != ("<f8" if f.type == "f8" else "<i8", f.type == "enum"):
            raise ValueError(c.name)
    if kind in ("values", "meta"):
        if not NEEDED_COLUMNS[kind] <= set(names):
            raise ValueError(kind)
        # what belongs to these records comes right behind their columns
        if offsets != list(range(FIELDS_AT, FIELDS_AT + 8 * len(offsets), 8)) or offsets[-1] + 16 > slot_bytes:
            raise ValueError(kind)
    return columns


def _column(cells: Any, slot_bytes: int) -> Column:
    column = Column(*cells)
    name: Any = column.name
    kind: Any = column.type
    offset: Any = column.offset
    enum: Any = column.enum
    if not (isinstance(name, str) and name.isidentifier() and name.isascii() and len(name) < 100 and name != "engine"):
        raise ValueError(name)
    if kind not in ("<i8", "<f8") or type(offset) is not int or type(enum) is not bool or (enum and kind != "<i8"):
        raise ValueError(name)
    words: tuple[Any, ...] = column.unit, column.role
    if not all(isinstance(w, str) for w in words):
        raise ValueError(name)
    if offset % 8 or not FIELDS_AT <= offset <= slot_bytes - 8:
        raise ValueError(name)
    return column
