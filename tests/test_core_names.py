"""Where an engine core's files go if their names are taken: by a process of the same number, or by somebody else."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kvhook
from kvhook.cli import main
from kvhook.core.ledger import LedgerRing
from kvhook.core.plan import CorePlan
from kvhook.core.process import process
from kvhook.discovery.cleaning import HISTORY_PREFIX, MARK_PREFIX
from kvhook.recording.core_side import CoreSide
from kvhook.ring.trace_file import header_of
from tests.conftest import give_away
from tests.core.played_core import Request, Scheduler, core_of
from tests.standin import fake_vllm, step_stats


@pytest.fixture
def play(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[kvhook.Session, int], Scheduler]:
    """Has a played engine core make steps, which a session records."""
    monkeypatch.setattr("kvhook.core.process.read_core", core_of)

    def steps(session: kvhook.Session, count: int) -> Scheduler:
        sched = Scheduler(1, 30, 4, 4, 16)
        session._core_side.attach(sched)
        sched.add_request(Request("a", list(range(2, 18 + 16 * (count - 1))), 1, 4))
        for _ in range(count):
            sched.update_from_output(sched.schedule())
        return sched

    return steps


def plant(path: Path, what: str) -> None:
    """Put something at a name."""
    if what == "pipe":
        os.mkfifo(path)
    elif what == "link":
        path.symlink_to(path.with_name("victim"))
    elif what == "directory":
        path.mkdir()
    else:
        path.write_text("theirs")


@pytest.mark.parametrize("what", ["file", "pipe", "link", "directory"])
def test_a_core_takes_another_name_where_something_has_its_own(fresh: Path, play: Any, what: str):
    for stream in ("core", "blocks"):
        plant(fresh / f"run.{stream}0-{os.getpid()}.kvh", what)
    with kvhook.install(trace=fresh / "run.kvh", core="blocks") as session:
        sched = play(session, 5)
        assert len(session.core_steps()) == 5
        assert len(session.blocks()) > 0
        assert session.faults == {}
        assert session.health().ok
        del sched
    names = {path.name for path in fresh.glob("run.*-2.kvh")}
    assert names == {f"run.{stream}0-{os.getpid()}-2.kvh" for stream in ("core", "blocks")}
    assert not (fresh / "victim").exists()


def test_two_processes_of_one_number_and_one_trace_each_have_their_own_cores(fresh: Path, play: Any, capsys: Any):
    """Two containers that share a folder: process 1 in both."""
    written = []
    for count in (3, 5):
        with fake_vllm() as vllm, kvhook.install(trace=fresh / "run.kvh", core="blocks") as session:
            engine = vllm.engine()
            engine.plan += [step_stats(kv_cache_usage=0.5)] * count
            sched = play(session, count)
            for _ in range(count):
                engine.step()
            assert len(session.core_steps()) == count
            del sched
        written.append((session.files[0], count))
    assert written[0][0] != written[1][0]
    for path, count in written:
        trace = kvhook.open(path)
        assert len(trace.steps()) == len(trace.cores().steps()) == count
        assert len(trace.cores()) == 1
        assert trace.cores().facts[0]["session"] == trace.meta["engines"][0]["session"]
        capsys.readouterr()
        assert main(["cache", str(path), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["num_steps"] == count
    assert len(kvhook.open(fresh / "run*.kvh").cores().steps()) == 8


def test_parts_stay_in_the_order_of_their_names_whoever_has_taken_some(tmp_path: Path):
    names = CorePlan("steps", "/rings", 64, str(tmp_path / "run"), None, "s", "00", 1).names(7, 0)

    def make(part: int) -> str:
        path = next(path for path in names(part) if not path.exists())
        path.touch()
        return path.name

    theirs = [tmp_path / f"run.core0-7{more}.kvh" for more in ("", "-2", "-3")]
    for path in theirs:
        path.touch()
    assert make(0) == "run.core0-7-4.kvh"
    for path in theirs:
        path.unlink()
    next(names(1))  # which could not be made
    assert [make(1), make(2)] == ["run.core0-7-5.kvh", "run.core0-7-6.kvh"]


def test_a_ledger_s_ring_takes_another_name_too(tmp_path: Path):
    rings = [LedgerRing(0, tmp_path, 64, {"serial": 0}) for _ in range(2)]
    first, second = (ring.ring.path for ring in rings)
    assert first != second
    assert header_of(second).meta["ring"] == str(second)
    for ring in rings:
        ring.close()


def test_what_a_core_could_not_write_is_counted_as_lost(fresh: Path, play: Any, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kvhook.ring.trace_file.create_file", full)
    session = kvhook.install(trace=fresh / "run.kvh", core="steps")
    sched = play(session, 5)
    process.drain()
    lost = session.cores().lost
    assert lost >= 5
    assert session.health().records_lost == lost
    assert f"{lost} LOST" in str(session.health())
    assert "No space left" in session.cores().why_none
    kvhook.uninstall()
    assert session.cores().lost == session.health().records_lost >= lost
    del sched


# ---- the folder of a recording without a trace ---------------------------------------------------------------------


def test_nobody_can_tell_from_the_mark_how_the_folder_of_cores_will_be_called(fresh: Path, play: Any):
    session = kvhook.install(core="steps")
    disk = fresh / "disk"
    (mark,) = disk.glob(f"{MARK_PREFIX}*")
    play(session, 2)
    (folder,) = disk.glob(f"{HISTORY_PREFIX}*-core*")
    assert folder.name.rpartition("-core")[2] not in mark.name
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    kvhook.uninstall()


@pytest.mark.parametrize("what", ["somebody else's directory", "link", "file"])
def test_a_folder_for_cores_that_somebody_has_planted_is_not_used(fresh: Path, play: Any, what: str):
    session = kvhook.install(core="steps")
    folder, elsewhere = session._core_side._folder(), fresh / "elsewhere"
    elsewhere.mkdir()
    if what == "link":
        folder.symlink_to(elsewhere)
    elif what == "file":
        folder.write_text("theirs")
    else:
        folder.mkdir()
        give_away(folder, 12345)
    play(session, 2)
    assert "refused" in session.cores().why_none or "not a directory" in session.cores().why_none
    assert not session.health().ok
    assert list(elsewhere.iterdir()) == []
    assert not folder.is_dir() or list(folder.iterdir()) == []
    kvhook.uninstall()


def test_a_folder_that_others_may_write_to_is_closed_to_them(fresh: Path, play: Any):
    session = kvhook.install(core="steps")
    folder = session._core_side._folder()
    folder.mkdir()
    folder.chmod(0o777)
    sched = play(session, 2)
    assert len(session.core_steps()) == 2
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    del sched
    kvhook.uninstall()


def test_a_pipe_at_the_name_of_a_session_s_mark_makes_no_core_wait(tmp_path: Path):
    os.mkfifo(tmp_path / "mark")
    plan = CorePlan("steps", "/rings", 64, "/run", None, "s", "00", 1, str(tmp_path / "mark"))
    assert plan.is_over


def test_the_folder_of_cores_is_the_recordings_own_only_without_a_trace(fresh: Path):
    for trace in (None, fresh / "run.kvh"):
        side = CoreSide(kvhook.options.Options(trace=trace, core="steps"), fresh / "rings")
        side.arm()
        assert side._plan is not None
        assert side._plan.temporary == (trace is None)
        side.disarm()
