"""Scopes and labels of a run of which there is nothing but the ring."""

from __future__ import annotations

import functools
import os
import stat
from pathlib import Path

import pytest

import kvhook
from kvhook.cli import main
from kvhook.discovery.directory import remove_path
from kvhook.discovery.watch import Watch
from kvhook.ring import notes
from kvhook.ring.notes import RingNotes, notes_of, read_notes
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
