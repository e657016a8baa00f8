"""Whatever is done to a file: a clear error or what is intact of it. Never a traceback, a hang, or an allocation that
a number in the file drives."""

from __future__ import annotations

import struct
import time
import tracemalloc

import pytest

from kvhook.cli import main
from kvhook.errors import TraceFormatError
from kvhook.ring.layout import seal
from kvhook.trace import open_trace
from tests.ring.damaged import RING_NAME, STEPS, Files, commands, use
from tests.ring.synthetic import LAYOUT

SLOT = LAYOUT.slot_bytes


@pytest.mark.parametrize("kind", ["trace", "ring"])
def test_intact_files_are_read_whole(files: Files, kind: str):
    path = files.put(getattr(files, kind), "run.kvh" if kind == "trace" else RING_NAME)
    assert use(path) == STEPS
    assert [code for code, _ in commands(path)] == [0, 0, 0]
    path.unlink()


def cuts() -> list[int]:
    """Lengths of every class: nothing, within the magic, the words, the schema, on and beside each kind of boundary."""
    ends = [0, 1, 7, 8, 9, 111, 112, 120, 127, 128, 136, 255, 256, 257, 4095]
    return [*ends, *(4096 * page + d for page in (1, 2) for d in (-1, 0, 1))]


@pytest.mark.parametrize("length", cuts())
def test_cut_off_in_or_near_the_header(files: Files, length: int):
    path = files.put(files.trace[:length], "cut.kvh")
    assert use(path) == (None if length < files.header else 0)
    if length < files.header:
        assert all(code == 1 and "Traceback" not in err and err.count("\n") == 1 for code, err in commands(path))
    path.unlink()


@pytest.mark.parametrize("within", [0, 1, 7, 8, 15, 16, 17, 24, 31, 32, 33, SLOT // 2, SLOT - 1])
@pytest.mark.parametrize("slot", [0, 1, 12, -1])
def test_cut_off_in_a_slot_the_prefix_is_intact(files: Files, slot: int, within: int):
    count = (len(files.trace) - files.header) // SLOT
    at = files.header + (slot % count) * SLOT
    path = files.put(files.trace[: at + within], "cut.kvh")
    kinds = [struct.unpack_from("<i", files.trace, p + 24)[0] for p in range(files.header, at, SLOT)]
    assert use(path) == kinds.count(1)
    path.unlink()


def test_a_ring_that_was_cut_off_says_so(files: Files):
    path = files.put(files.ring[:-1], RING_NAME)
    with pytest.raises(
        TraceFormatError, match=f"is cut short: {len(files.ring) - 1} of at least {len(files.ring)} bytes"
    ):
        open_trace(path)
    assert use(path) is None
    path.unlink()


def test_a_flipped_bit_in_the_facts_is_damage_and_not_another_fact(files: Files):
    at = files.trace.index(b"tiny-llama", files.header)
    data = bytearray(files.trace)
    data[at] ^= 0x02
    path = files.put(bytes(data), "facts.kvh")
    trace = open_trace(path)
    assert trace.meta["damaged"] == 1
    assert "viny-llama" not in str(trace.summary())
    assert len(trace.steps()) == STEPS
    path.unlink()


LIES = [(at, value) for at in (16, 24, 56, 64, 104, 128) for value in (0, 1, 1 << 20, 1 << 32, 1 << 40, (1 << 64) - 1)]


@pytest.mark.parametrize(("at", "value"), LIES)
@pytest.mark.parametrize("kind", ["trace", "ring"])
def test_no_number_in_the_header_drives_an_allocation(files: Files, kind: str, at: int, value: int):
    data = bytearray(getattr(files, kind))
    struct.pack_into("<Q", data, at, value)
    path = files.put(seal(data), "lie.kvh" if kind == "trace" else RING_NAME)
    tracemalloc.start()
    start = time.monotonic()
    try:
        use(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 32 << 20, f"{peak / 2**20:.0f} MiB for a file of {len(data) / 2**10:.0f} KiB"
    assert time.monotonic() - start < 20
    path.unlink()


def test_a_dead_ring_is_read_without_its_head(files: Files):
    for head in (0, 3, 1 << 40, (1 << 64) - 1):
        data = bytearray(files.ring)
        struct.pack_into("<Q", data, 128, head)
        path = files.put(bytes(data), RING_NAME)
        assert use(path) == STEPS
        path.unlink()


@pytest.mark.parametrize("major", [0, 2, 99])
def test_a_ring_of_another_major_layout_is_refused_by_every_verb(
    files: Files, major: int, capsys: pytest.CaptureFixture[str]
):
    data = bytearray(files.ring)
    struct.pack_into("<Q", data, 8, major << 32)
    path = files.put(seal(data), RING_NAME)
    for argv in (["tail", str(path)], ["autopsy", str(path)], ["summary", str(path)]):
        assert main(argv) == 1
        said = capsys.readouterr().err
        assert f"was written by kvhook 0.1.0 in layout {major}; this one reads layout 1" in said
    assert main(["ls", "--dir", str(path.parent)]) == 0
    out = capsys.readouterr().out
    assert "damaged" in out
    assert f"in layout {major}" in out
    path.unlink()


@pytest.mark.parametrize("content", [b"", b"KVHOOK01", b"PAR1" * 5000, b"\0" * 9000])
def test_what_is_none_of_ours_is_refused(files: Files, content: bytes):
    for name in ("other.kvh", RING_NAME):
        path = files.put(content, name)
        assert use(path) is None
        assert all(code == 1 and err.count("\n") == 1 for code, err in commands(path))
        path.unlink()
