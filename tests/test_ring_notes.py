"""Scopes and labels of a run of which there is nothing but the ring."""

from __future__ import annotations

import functools
import os
import stat
from pathlib import Path

import pytest

import kvhook
from kvhook.cli import main
from kvhook.discovery.watch import Watch
from kvhook.ring import notes
from kvhook.ring.directory import remove_path
from kvhook.ring.notes import RingNotes, notes_of, read_notes
from tests.conftest import give_away
from tests.standin import fake_vllm, step_stats


def test_a_live_ring_tells_scopes_and_labels(fresh: Path, capsys: pytest.CaptureFixture[str]):
    with fake_vllm() as vllm, kvhook.install(ring_dir=fresh) as session:
        with session.scope("warm-up"):
            engine = vllm.engine()
            engine.plan += [step_stats(kv_cache_usage=0.9)] * 3
            for _ in range(3):
                engine.step()
        with session.scope("measured"):
            engine.plan += [step_stats(kv_cache_usage=0.2)] * 5
            for _ in range(5):
                engine.step()
            (ring,) = session.rings
            trace = kvhook.open(ring)
            assert [(s.path, s.ended_ns >= 0) for s in trace.scopes] == [("warm-up", True), ("measured", False)]
            assert len(trace.select(scope="measured").steps()) == 5
            assert trace.summary().kv_cache_usage_peak == pytest.approx(0.2)
            watch = Watch(lambda: [fresh])
            watch.refresh()
            assert [view.scope for view in watch.views(10.0)] == ["measured"]
            watch.close()
            os.environ["KVHOOK_DIR"] = str(fresh)
            try:
                assert main(["summary", str(os.getpid()), "--scope", "warm-up"]) == 0
            finally:
                del os.environ["KVHOOK_DIR"]
            assert "3 steps" in capsys.readouterr().out
        assert session.faults == {}
    assert [s.ended_ns >= 0 for s in kvhook.open(ring).scopes] == [True, True]
    assert stat.S_IMODE(notes_of(ring).stat().st_mode) == 0o600
    assert remove_path(ring)
    assert not notes_of(ring).exists()


def test_a_process_without_a_ring_is_one_line(fresh: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["summary", "1"]) == 1
    assert "there is no ring of process 1" in capsys.readouterr().err


def test_notes_that_have_become_long_begin_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(notes, "MOST_BYTES", 400)
    ring, beside = tmp_path / "1-2-3.ring", RingNotes()
    ring.touch()
    beside.begin(ring, [])
    for number in range(100):
        event = ["end", number, 5]
        beside.take([event], functools.partial(list, [event]))
    assert notes_of(ring).stat().st_size < 500
    assert read_notes(ring)[-1] == ["end", 99, 5]


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"[", b"[" * 100_000, b'{"a": 1}\n7\n["x"]\n', b'[["scope", 1]]\n']
)
def test_notes_that_are_none_are_left_out(content: bytes, fresh: Path):
    with fake_vllm() as vllm, kvhook.install(ring_dir=fresh) as session:
        engine = vllm.engine()
        engine.plan.append(step_stats())
        engine.step()
        (ring,) = session.rings
    notes_of(ring).write_bytes(content)
    assert kvhook.open(ring).scopes == []
    notes_of(ring).unlink()
    notes_of(ring).symlink_to(__file__)
    assert kvhook.open(ring).scopes == []


def test_where_no_notes_can_be_written_the_run_goes_on(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(notes, "NOTES_SUFFIX", "x" * 300)
    with fake_vllm() as vllm, kvhook.install(ring_dir=fresh) as session:
        with session.scope("A"):
            engine = vllm.engine()
            engine.plan.append(step_stats())
            engine.step()
        assert [s.path for s in session.scopes] == ["A"]
        assert session.faults == {}


def plant(path: Path, what: str, victim: Path) -> None:
    """Put something at the name of a ring's notes."""
    if what == "pipe":
        os.mkfifo(path)
    elif what == "link":
        path.symlink_to(victim)
    elif what == "second name":
        path.hardlink_to(victim)
    elif what == "long file":
        path.write_bytes(b"x" * (2 * notes.MOST_BYTES))
    else:
        path.write_text("theirs")


def read_within(path: Path) -> bytes | None:
    """What a file holds; None if it is none."""
    return path.read_bytes() if stat.S_ISREG(path.lstat().st_mode) else None


PLANTED = ["pipe", "link", "second name", "file", "long file"]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("what", PLANTED)
def test_what_is_at_the_name_of_notes_is_neither_waited_for_nor_touched(tmp_path: Path, what: str, known: bool):
    ring, victim, beside = tmp_path / "1-2-3.ring", tmp_path / "victim", RingNotes()
    victim.write_text("dear")
    plant(notes_of(ring), what, victim)
    before = notes_of(ring).lstat(), read_within(notes_of(ring))
    beside.begin(ring, [["name", "label", 0, "secret"]] if known else [])
    for number in range(3):
        beside.take([["end", number, 5]], lambda: [["end", 0, 5]])
    after = notes_of(ring).lstat(), read_within(notes_of(ring))
    assert (before[0].st_ino, before[0].st_mode, before[1]) == (after[0].st_ino, after[0].st_mode, after[1])
    assert victim.read_text() == "dear"


@pytest.mark.parametrize("what", PLANTED)
def test_what_takes_the_place_of_notes_is_not_written_to_either(tmp_path: Path, what: str):
    ring, victim, beside = tmp_path / "1-2-3.ring", tmp_path / "victim", RingNotes()
    victim.write_text("dear")
    beside.begin(ring, [["end", 0, 5]])
    notes_of(ring).unlink()
    plant(notes_of(ring), what, victim)
    before = read_within(notes_of(ring))
    beside.take([["end", 1, 5]], lambda: [["end", 0, 5]])
    assert read_within(notes_of(ring)) == before
    assert victim.read_text() == "dear"


def test_notes_that_have_got_a_second_name_are_not_written_to(tmp_path: Path):
    ring, beside = tmp_path / "1-2-3.ring", RingNotes()
    beside.begin(ring, [["end", 0, 5]])
    (tmp_path / "kept").hardlink_to(notes_of(ring))
    beside.take([["end", 1, 5]], list)
    assert b"1" not in (tmp_path / "kept").read_bytes()


def test_notes_of_somebody_else_than_the_ring_are_not_read(tmp_path: Path):
    ring = tmp_path / "1-2-3.ring"
    ring.touch()
    notes_of(ring).write_text('[["end", 0, 5]]\n')
    assert read_notes(ring) == [["end", 0, 5]]
    give_away(notes_of(ring), 12345)
    assert read_notes(ring) == []
