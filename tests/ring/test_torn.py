"""No torn record is ever accepted; and the harness that says so finds those of writers that are broken on purpose.

The long run is ``python benchmarks/ring_torn.py``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from kvhook.ring.reader import RingReader
from kvhook.ring.writer import RingWriter
from tests.ring import torn

READS = 60_000


@pytest.mark.parametrize("crc", [False, True], ids=["plain", "crc"])
@pytest.mark.parametrize("eye", torn.EYES)
def test_no_torn_record_is_accepted(tmp_path: Path, eye: str, crc: bool):
    seen = torn.run(tmp_path, "good", eye, READS, crc=crc, seconds=30)
    assert seen.torn == 0
    assert seen.accepted > 1000, "it read next to nothing, and so says next to nothing"


@pytest.mark.parametrize(("writer", "eye"), [("late_stamp", "stamps"), ("pack_into", "stamps"), ("careless", "poll")])
def test_a_broken_writer_is_found_out(tmp_path: Path, writer: str, eye: str):
    seen = torn.run(tmp_path, writer, eye, 10_000_000, seconds=60)
    assert seen.torn > 0, f"{seen.reads:,} reads of a broken writer, and nothing was noticed"


def test_the_harness_knows_a_whole_record_from_a_torn_one(tmp_path: Path):
    ring = RingWriter(tmp_path / "a.ring", torn.LAYOUT, torn.CAPACITY, {"kvhook": "t", "engine": 0})
    for n in range(5):
        torn.good(ring, n)
    at = ring.header_bytes + 3 * torn.LAYOUT.slot_bytes + 1000
    ring.map[at] ^= 1
    with RingReader(tmp_path / "a.ring") as reader:
        slots = reader.poll().slots
    assert len(slots) == 5
    assert torn.count_torn(slots) == 1
    assert torn.count_torn(slots[[0, 1, 2, 4]]) == 0
