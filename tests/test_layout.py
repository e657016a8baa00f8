"""The header's bytes: what goes in comes out, and what is damaged or foreign is refused with a reason."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable

import pytest

from kvhook.errors import TraceFormatError
from kvhook.ring import layout as L
from kvhook.ring.layout import Layout, make_layout, pack_header, parse_header, seal
from kvhook.schema import KINDS, STEP_FIELDS

META = {"kvhook": "9.9", "vllm": "0.32.0", "engine": 3, "absent": {"step": {"mm_cache_hits": "no such thing"}}}
LAYOUT = make_layout({})


def pack(layout: Layout = LAYOUT, capacity: int = 0, crc: bool = True, **meta: object) -> bytearray:
    return bytearray(
        pack_header(layout, META | meta, capacity=capacity, pid=42, process_start=777, clocks=(1, 2), crc=crc)
    )


def put(data: bytearray, at: int, value: int) -> None:
    struct.pack_into("<Q", data, at, value)


def test_what_is_packed_is_parsed():
    data = pack()
    header = parse_header(bytes(data), len(data), "x")
    assert header.layout == LAYOUT
    assert header.meta == META
    assert (header.pid, header.process_start, header.monotonic_ns, header.realtime_ns) == (42, 777, 1, 2)
    assert (header.capacity, header.crc, header.state, header.head) == (0, True, L.LIVE, 0)
    assert header.header_bytes == len(data)
    assert len(data) % 4096 == 0


def test_documented_offsets():
    data = pack(capacity=64, crc=False)
    words = struct.unpack_from("<16Q", data)
    assert data[:8] == b"KVHOOK01"
    assert words[1] == 1 << 32
    assert words[2] == LAYOUT.slot_bytes
    assert words[3] == 64
    assert words[4] == 42
    assert words[5] == 0
    assert words[6] == 777
    at, size, crc = words[7:10]
    assert zlib.crc32(data[at : at + size]) == crc
    assert json.loads(data[at : at + size])["engine"] == 3
    assert words[10:12] == (1, 2)
    assert words[12] == 1
    assert words[13] == len(data)
    assert words[14] == zlib.crc32(data[:96] + data[104:112])


def test_slots_are_whole_cache_lines_and_columns_do_not_overlap():
    few = make_layout({"step": STEP_FIELDS[:2], "request": ()})
    for layout in (LAYOUT, few):
        assert layout.slot_bytes % 64 == 0
        for columns in layout.columns.values():
            offsets = [c.offset for c in columns]
            assert offsets == [32 + 8 * i for i in range(len(offsets))]
            assert not offsets or offsets[-1] + 8 <= layout.slot_bytes
    assert few.slot_bytes < LAYOUT.slot_bytes
    assert [c.name for c in few.columns["step"]] == [f.name for f in STEP_FIELDS[:2]]


@pytest.mark.parametrize("kind", KINDS)
def test_packer_fills_the_body_of_a_slot(kind: str):
    assert LAYOUT.struct_of(kind).size == LAYOUT.slot_bytes - 16


def test_large_facts_take_more_pages():
    data = pack(long="x" * 10_000)
    assert len(data) == 16384 or len(data) == 20480
    assert parse_header(bytes(data), len(data), "x").meta["long"] == "x" * 10_000


def test_facts_that_no_header_may_hold_are_refused():
    with pytest.raises(ValueError, match="more than a header may hold"):
        pack(long="x" * (1 << 20))


DAMAGE: dict[str, Callable[[bytearray], object]] = {
    "no slot size": lambda d: put(d, 16, 0),
    "slot of no whole cache lines": lambda d: put(d, 16, LAYOUT.slot_bytes + 8),
    "huge slot": lambda d: put(d, 16, 1 << 40),
    "capacity no power of two": lambda d: put(d, 24, 100),
    "huge capacity": lambda d: put(d, 24, 1 << 40),
    "capacity beyond the file": lambda d: put(d, 24, 1 << 10),
    "schema before its place": lambda d: put(d, 56, 0),
    "schema behind the header": lambda d: put(d, 56, 1 << 40),
    "schema longer than the header": lambda d: put(d, 64, 1 << 40),
    "schema's checksum": lambda d: put(d, 72, 1),
    "a letter in the schema": lambda d: d.__setitem__(300, d[300] ^ 1),
    "header longer than the file": lambda d: put(d, 104, 1 << 40),
    "header of no whole pages": lambda d: put(d, 104, len(d) - 8),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_header_is_refused_by_its_checksum(damage: str):
    data = pack()
    DAMAGE[damage](data)
    with pytest.raises(TraceFormatError, match="x: the header is damaged"):
        parse_header(bytes(data), len(data), "x")


@pytest.mark.parametrize("damage", DAMAGE)
def test_forged_header_with_a_right_checksum_is_refused_by_its_numbers(damage: str):
    data = pack()
    DAMAGE[damage](data)
    forged = seal(data)
    with pytest.raises(TraceFormatError, match=r"x: the header is damaged|x is cut short"):
        parse_header(forged, len(forged), "x")


@pytest.mark.parametrize("at", [*range(96), *range(104, 120)])
def test_no_bit_of_the_header_may_flip(at: int):
    # all but the state, which the writer changes
    data = pack()
    data[at] ^= 1 << at % 8
    with pytest.raises(TraceFormatError):
        parse_header(bytes(data), len(data), "x")


def reschema(data: bytearray, change: Callable[[dict], object]) -> bytes:
    """Another schema, with the right checksums."""
    at, size = struct.unpack_from("<2Q", data, 56)
    schema = json.loads(data[at : at + size])
    change(schema)
    text = json.dumps(schema).encode()
    assert len(text) <= len(data) - at
    data[at : at + len(text)] = text
    put(data, 64, len(text))
    put(data, 72, zlib.crc32(text))
    return seal(data)


SCHEMAS: dict[str, Callable[[dict], object]] = {
    "no columns": lambda s: s.pop("columns"),
    "columns are no table": lambda s: s.update(columns=5),
    "a kind is missing": lambda s: s["columns"].pop("request"),
    "column of an unknown type": lambda s: s["columns"]["step"][0].__setitem__(1, "|O"),
    "column in the slot's head": lambda s: s["columns"]["step"][0].__setitem__(2, 8),
    "column behind the slot": lambda s: s["columns"]["step"][0].__setitem__(2, 1 << 20),
    "column between two words": lambda s: s["columns"]["step"][0].__setitem__(2, 33),
    "column without a place": lambda s: s["columns"]["step"].__setitem__(0, ["step"]),
}


@pytest.mark.parametrize("change", SCHEMAS)
def test_schema_that_leads_out_of_the_slot_is_refused(change: str):
    data = reschema(pack(), SCHEMAS[change])
    with pytest.raises(TraceFormatError, match="damaged"):
        parse_header(data, len(data), "x")


def test_column_that_this_kvhook_does_not_know_is_welcome():
    # A newer kvhook adds columns; an older one still reads the rest.
    data = reschema(pack(), lambda s: s["columns"]["step"][0].__setitem__(0, "new_in_2031"))
    assert parse_header(data, len(data), "x").layout.columns["step"][0].name == "new_in_2031"


@pytest.mark.parametrize("content", [b"", b"KVHOOK01", b"\0" * 100])
def test_too_short_a_file_is_refused(content: bytes):
    with pytest.raises(TraceFormatError, match="too short"):
        parse_header(content, len(content), "x")


def test_another_format_is_refused():
    with pytest.raises(TraceFormatError, match="not a kvhook ring or trace"):
        parse_header(b"PAR1".ljust(8192, b"\0"), 8192, "x")


def test_header_whose_magic_is_not_yet_there_is_refused():
    # The writer stores the magic last.
    data = pack()
    data[:8] = bytes(8)
    with pytest.raises(TraceFormatError, match="not a kvhook"):
        parse_header(bytes(data), len(data), "x")


def test_another_major_version_is_refused_by_the_name_of_its_writer():
    data = pack()
    put(data, 8, 3 << 32)
    with pytest.raises(TraceFormatError, match=r"kvhook 9\.9 in layout 3; this one reads layout 1"):
        parse_header(bytes(data), len(data), "x")


def test_another_minor_version_is_read():
    data = pack()
    put(data, 8, 1 << 32 | 7)
    assert parse_header(seal(data), len(data), "x").layout == LAYOUT
