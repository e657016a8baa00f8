"""Writer and reader of a ring: what is published is read, what is overwritten is counted."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from kvhook.errors import TraceFormatError
from kvhook.ring.layout import make_layout, seal
from kvhook.ring.reader import RingReader
from kvhook.ring.slots import slot_head
from kvhook.ring.writer import RingWriter
from kvhook.schema import STEP, Field
from tests.conftest import Python

if TYPE_CHECKING:
    from kvhook.ring.slots import Slots

FIELDS = tuple(Field(name, "i8", "id", "", "") for name in ("a", "b"))
LAYOUT = make_layout({"step": FIELDS})
PACK = LAYOUT.struct_of("step").pack


class Ring:
    """A writer that counts; record n holds (1000 + n, -n)."""

    def __init__(self, path: Path, capacity: int, *, crc: bool = False) -> None:
        self.writer = RingWriter(path, LAYOUT, capacity, {"kvhook": "t", "engine": 0}, crc=crc)
        self.n = 0

    def write(self, count: int) -> None:
        for n in range(self.n, self.n + count):
            self.n = self.writer.publish(n, PACK(n, STEP, 0, 1000 + n, -n))


def read(slots: Slots) -> list[int]:
    """The numbers of the records, after a look at what is in them."""
    n = slot_head(slots)["n"]
    fields = np.ascontiguousarray(slots[:, 32:48]).view("<i8").reshape(-1, 2)
    assert (fields[:, 0] == 1000 + n).all()
    assert (fields[:, 1] == -n).all()
    return n.tolist()


@pytest.fixture(params=[False, True], ids=["plain", "crc"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[int], tuple[Ring, RingReader]]:
    def make(capacity: int) -> tuple[Ring, RingReader]:
        path = tmp_path / "a.ring"
        return Ring(path, capacity, crc=request.param), RingReader(path)

    return make


Make = Callable[[int], tuple[Ring, RingReader]]


def test_what_is_published_is_read_once(make: Make):
    ring, reader = make(16)
    ring.write(5)
    assert read(reader.poll().slots) == [0, 1, 2, 3, 4]
    assert len(reader.poll().slots) == 0
    ring.write(3)
    batch = reader.poll()
    assert (read(batch.slots), batch.lost, reader.lost) == ([5, 6, 7], 0, 0)


@pytest.mark.parametrize("at_once", [1, 3, 7, 14, 15])
def test_a_reader_that_keeps_up_misses_nothing_round_and_round(make: Make, at_once: int):
    ring, reader = make(16)
    got: list[int] = []
    while ring.n < 100:
        ring.write(at_once)
        got += read(reader.poll().slots)
    assert got == list(range(ring.n))
    assert reader.lost == 0


@pytest.mark.parametrize("written", [16, 17, 40, 100])
def test_a_reader_that_is_overrun_counts_what_it_missed(make: Make, written: int):
    # Of 16 slots 15 can be trusted: the 16th may be being overwritten.
    ring, reader = make(16)
    ring.write(written)
    batch = reader.poll()
    assert read(batch.slots) == list(range(written - 15, written))
    assert batch.lost == reader.lost == written - 15
    ring.write(4)
    assert read(reader.poll().slots) == list(range(written, written + 4))
    assert reader.lost == written - 15


def test_a_late_reader_begins_with_the_oldest_and_has_lost_nothing(tmp_path: Path):
    ring = Ring(tmp_path / "a.ring", 16)
    ring.write(50)
    with RingReader(tmp_path / "a.ring") as reader:
        assert read(reader.poll().slots) == list(range(35, 50))
        assert reader.lost == 0


def test_a_late_reader_that_wants_all_counts_what_is_gone(tmp_path: Path):
    ring = Ring(tmp_path / "a.ring", 16)
    ring.write(50)
    with RingReader(tmp_path / "a.ring", 0) as reader:
        assert read(reader.poll().slots) == list(range(35, 50))
        assert reader.lost == 35


def test_poll_takes_no_more_than_asked_and_leaves_the_rest(make: Make):
    ring, reader = make(64)
    ring.write(10)
    assert read(reader.poll(4).slots) == [0, 1, 2, 3]
    assert read(reader.poll(4).slots) == [4, 5, 6, 7]
    assert read(reader.poll(4).slots) == [8, 9]


def test_two_readers_do_not_disturb_each_other(tmp_path: Path):
    ring = Ring(tmp_path / "a.ring", 16)
    one, two = RingReader(tmp_path / "a.ring"), RingReader(tmp_path / "a.ring")
    ring.write(6)
    assert read(one.poll().slots) == read(two.poll().slots) == list(range(6))


def test_a_record_that_is_being_written_is_not_read(tmp_path: Path):
    ring = Ring(tmp_path / "a.ring", 16)
    ring.write(5)
    slot = (ring.writer.header_bytes + 3 * LAYOUT.slot_bytes) // 8
    ring.writer.words[slot] = 2 * 3 + 1
    reader = RingReader(tmp_path / "a.ring")
    batch = reader.poll()
    assert (read(batch.slots), batch.lost) == ([0, 1, 2, 4], 1)


def test_a_flipped_bit_is_noticed_where_the_crc_is_on(tmp_path: Path):
    ring = Ring(tmp_path / "a.ring", 16, crc=True)
    ring.write(5)
    at = ring.writer.header_bytes + 2 * LAYOUT.slot_bytes + 40
    ring.writer.map[at] ^= 1
    batch = RingReader(tmp_path / "a.ring").poll()
    assert (read(batch.slots), batch.lost) == ([0, 1, 3, 4], 1)


def test_the_record_behind_the_head_is_read_when_the_writer_is_dead(tmp_path: Path):
    # Killed between the record and the head: the record is whole.
    ring = Ring(tmp_path / "a.ring", 16)
    ring.write(5)
    ring.writer.words[16] = 4
    reader = RingReader(tmp_path / "a.ring", 0)
    assert read(reader.poll().slots) == [0, 1, 2, 3]
    assert read(reader.poll(final=True).slots) == [4]
    assert reader.lost == 0


def test_final_poll_takes_no_old_record_for_a_new_one(make: Make):
    ring, reader = make(16)
    ring.write(20)
    assert read(reader.poll(final=True).slots) == list(range(5, 20))


def test_closed_is_seen_and_the_records_stay(make: Make):
    ring, reader = make(16)
    ring.write(5)
    seen = [reader.closed]
    ring.writer.close()
    ring.writer.close()
    seen.append(reader.closed)
    assert seen == [False, True]
    assert ring.writer.head == 5
    assert read(reader.poll().slots) == [0, 1, 2, 3, 4]


def test_a_step_under_way_while_the_ring_is_closed_ends_well(tmp_path: Path):
    ring = Ring(tmp_path / "a.ring", 16)
    publish = ring.writer.publish
    ring.writer.close()
    assert publish(0, PACK(0, STEP, 0, 1000, 0)) == 1


def test_arrays_outlive_the_reader(make: Make):
    ring, reader = make(16)
    ring.write(3)
    slots = reader.poll().slots
    reader.close()
    reader.close()
    ring.write(40)
    assert read(slots) == [0, 1, 2]


def test_the_file_is_of_its_owner_alone_and_all_allocated(tmp_path: Path):
    Ring(tmp_path / "a.ring", 1024)
    info = (tmp_path / "a.ring").stat()
    assert stat.S_IMODE(info.st_mode) == 0o600
    assert info.st_blocks * 512 >= info.st_size >= 1024 * LAYOUT.slot_bytes


def test_an_existing_file_is_not_taken(tmp_path: Path):
    (tmp_path / "a.ring").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        Ring(tmp_path / "a.ring", 16)
    assert (tmp_path / "a.ring").read_bytes() == b"mine"


def test_links_are_not_followed(tmp_path: Path):
    Ring(tmp_path / "a.ring", 16)
    (tmp_path / "link.ring").symlink_to(tmp_path / "a.ring")
    with pytest.raises(OSError, match="symbolic link"):
        RingReader(tmp_path / "link.ring")


@pytest.mark.parametrize("capacity", [0, 1, 3, 100, -2, 1 << 40])
def test_only_powers_of_two_make_a_ring(tmp_path: Path, capacity: int):
    with pytest.raises(ValueError, match="power of two"):
        RingWriter(tmp_path / "a.ring", LAYOUT, capacity, {})
    assert not (tmp_path / "a.ring").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"\0" * 5000])
def test_other_files_are_no_rings(tmp_path: Path, content: bytes):
    (tmp_path / "a.ring").write_bytes(content)
    with pytest.raises(TraceFormatError, match=r"a\.ring"):
        RingReader(tmp_path / "a.ring")


def test_another_process_reads_along_and_goes_and_the_ring_lives_on(tmp_path: Path, python: Python):
    ring = Ring(tmp_path / "a.ring", 64)
    ring.write(40)
    code = """
import sys
from pathlib import Path
from kvhook.ring.reader import RingReader
from kvhook.ring.slots import slot_head
with RingReader(Path(sys.argv[1])) as reader:
    slots = reader.poll().slots
    print(len(slots), int(slots[:, 32:40].copy().view("<i8").sum()), reader.writer_alive, reader.closed)
"""
    for _ in range(2):
        assert python(code, tmp_path / "a.ring").stdout.split() == ["40", str(sum(range(1000, 1040))), "True", "False"]
    ring.write(10)
    reader = RingReader(tmp_path / "a.ring")
    assert read(reader.poll().slots) == list(range(50))


def test_the_ring_of_a_process_that_ended_without_a_word_is_read(tmp_path: Path, python: Python):
    code = """
import os, sys
from pathlib import Path
from tests.test_ring_basics import Ring
ring = Ring(Path(sys.argv[1]), 16)
ring.write(21)
os._exit(0)
"""
    python(code, tmp_path / "a.ring")
    with RingReader(tmp_path / "a.ring") as reader:
        assert not reader.writer_alive
        assert not reader.closed
        assert read(reader.poll(final=True).slots) == list(range(6, 21))


def test_a_process_of_the_same_number_is_not_taken_for_the_writer(tmp_path: Path):
    Ring(tmp_path / "a.ring", 16)
    data = bytearray((tmp_path / "a.ring").read_bytes())
    data[48] ^= 1  # another start time
    (tmp_path / "b.ring").write_bytes(seal(data))
    assert int.from_bytes(data[32:40], "little") == os.getpid()
    assert RingReader(tmp_path / "a.ring").writer_alive
    assert not RingReader(tmp_path / "b.ring").writer_alive
