"""What an engine core leaves behind in a process of its own: found, listed, completed, cleaned away; without vLLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kvhook.cli import main
from kvhook.core.plan import CorePlan
from kvhook.discovery.cleaning import MARK_PREFIX, leftovers
from kvhook.records.core_files import open_cores
from kvhook.ring.place import process_start
from tests.conftest import ROOT

#: A process that records twelve steps of a core, copies five of them to its file, and is killed.
KILLED = """
import os, signal, sys, types
from pathlib import Path
from kvhook.core.recorder import CoreRecorder
from kvhook.core.writer import Writer
from kvhook.core_schema import CORE_STEP_FIELDS
from kvhook.recording.spool import Spool

def fault(where, error, then):
    raise error

rings, stem, parent = sys.argv[1], sys.argv[2], int(sys.argv[3])
core = types.SimpleNamespace(facts={"block_size": 16, "num_kv_blocks": 40}, absent={})
recorder = CoreRecorder(0, core, Path(rings), 64, {"session": "s", "parent": parent})
writer = Writer(recorder.ring.layout, recorder.ring.publish, 0, b"k" * 16)
spool = Spool(lambda part: iter([Path(f"{stem}.core0-{os.getpid()}.kvh")]), None, fault)

def step(number):
    writer.step(tuple(number if field.name == "step" else 7 for field in CORE_STEP_FIELDS))

spool._background.end()  # nothing is copied but when this says so
for number in range(5):
    step(number)
spool.add(recorder)
spool.drain()
for number in range(5, 12):
    step(number)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def killed(tmp_path: Path) -> int:
    """The number of the process that was killed."""
    (tmp_path / "rings").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, tmp_path / "rings", tmp_path / "run", str(os.getpid())],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.wait(timeout=120) == -9
    return process.pid


def steps_of(tmp_path: Path, killed: int) -> list[int]:
    file = tmp_path / f"run.core0-{killed}.kvh"
    numbers: list[int] = open_cores([file], "run").steps()["step"].tolist()
    return numbers


def test_what_only_the_ring_holds_is_read_as_well(tmp_path: Path, killed: int):
    assert steps_of(tmp_path, killed) == list(range(12))


def test_recover_completes_the_file_so_that_the_ring_is_no_longer_needed(
    tmp_path: Path, killed: int, capsys: pytest.CaptureFixture[str]
):
    file, rings = tmp_path / f"run.core0-{killed}.kvh", tmp_path / "rings"
    assert main(["recover", str(file), "--dir", str(rings)]) == 0
    assert capsys.readouterr().out == f"{file}: core 0: 7 records added\n"
    for ring in rings.iterdir():
        ring.unlink()
    assert steps_of(tmp_path, killed) == list(range(12))
    cores = open_cores([file], "run")
    assert cores.lost == 0
    assert cores.facts[0]["num_kv_blocks"] == 40
    assert main(["recover", str(file), "--dir", str(rings)]) == 0
    assert "it is complete" in capsys.readouterr().out


def test_recover_completes_what_a_link_leads_to_and_the_link_stays(tmp_path: Path, killed: int):
    file, link = tmp_path / f"run.core0-{killed}.kvh", tmp_path / "link.core0-1.kvh"
    link.symlink_to(file)
    assert main(["recover", str(link), "--dir", str(tmp_path / "rings")]) == 0
    for ring in (tmp_path / "rings").iterdir():
        ring.unlink()
    assert link.is_symlink()
    assert steps_of(tmp_path, killed) == list(range(12))


def test_a_session_that_ends_completes_the_files_of_cores_that_were_killed(
    tmp_path: Path, killed: int, monkeypatch: pytest.MonkeyPatch
):
    from kvhook.options import Options
    from kvhook.recording.core_side import CoreSide

    side = CoreSide(Options(trace=tmp_path / "run.kvh"), tmp_path / "rings")
    monkeypatch.setattr(CoreSide, "session", "s")
    side.arm()
    side.disarm()
    assert list((tmp_path / "rings").iterdir()) == []
    assert steps_of(tmp_path, killed) == list(range(12))


def test_ls_lists_it_as_a_core(tmp_path: Path, killed: int, capsys: pytest.CaptureFixture[str]):
    assert main(["ls", "--dir", str(tmp_path / "rings")]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if str(killed) in line)
    assert row.split()[:4] == [str(killed), "core", "0", "dead"]
    assert main(["ls", "--json", "--dir", str(tmp_path / "rings")]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["stream"], found["steps"], found["records"]) == ("core", 12, 12)


def test_clean_removes_it(tmp_path: Path, killed: int, capsys: pytest.CaptureFixture[str]):
    assert main(["clean", "--all", "--dir", str(tmp_path / "rings")]) == 0
    assert ".core  " in capsys.readouterr().out
    assert list((tmp_path / "rings").iterdir()) == []


def test_commands_that_show_an_engine_do_not_take_a_core_for_one(tmp_path: Path, killed: int, capsys: Any):
    for verb in ("autopsy", "tail"):
        more = [str(killed)] if verb == "tail" else []
        assert main([verb, *more, "--dir", str(tmp_path / "rings")]) == 1
        assert "there is no ring" in capsys.readouterr().err


def test_the_mark_of_a_session_is_removed_with_it_and_that_of_a_killed_process_by_clean(tmp_path: Path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    mine = tmp_path / f"{MARK_PREFIX}{os.getpid()}-{process_start(os.getpid())}-aa"
    left = tmp_path / f"{MARK_PREFIX}{dead.pid}-1-bb"
    plan = CorePlan("steps", "/rings", 64, "/run", None, "s", "00", os.getpid(), str(mine)).publish()
    left.touch()
    over = [plan.is_over]
    assert [one.path for one in leftovers([], tmp_path)] == [left]
    plan.withdraw()
    assert [*over, plan.is_over] == [False, True]
    assert not mine.exists()


def test_the_mark_of_a_session_in_another_container_stays_for_a_day(tmp_path: Path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here = os.stat("/proc/self/ns/pid").st_ino
    elsewhere = tmp_path / f"{MARK_PREFIX}{dead.pid}-1-aa-{here + 1}"
    old = tmp_path / f"{MARK_PREFIX}{dead.pid}-1-bb-{here + 1}"
    left = tmp_path / f"{MARK_PREFIX}{dead.pid}-1-cc-{here}"
    for path in (elsewhere, old, left):
        path.touch()
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(old, (two_days_ago, two_days_ago))
    assert {one.path for one in leftovers([], tmp_path)} == {old, left}


def test_who_removes_the_mark_of_a_plan_does_not_end_it(tmp_path: Path):
    mark = tmp_path / f"{MARK_PREFIX}{os.getpid()}-{process_start(os.getpid())}-aa"
    plan = CorePlan("steps", "/rings", 64, "/run", None, "s", "00", os.getpid(), str(mark)).publish()
    try:
        ask = (
            "import sys; from kvhook.core.plan import read_plan; plan = read_plan()\n"
            "for _ in sys.stdin: print(plan.is_over, flush=True)"
        )
        with subprocess.Popen(
            [sys.executable, "-c", ask], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as core:
            core_in, core_out = core.stdin, core.stdout
            assert core_in is not None
            assert core_out is not None

            def is_over() -> str:
                print(file=core_in, flush=True)
                return core_out.readline().strip()

            answers = [is_over()]
            Path(plan.mark).unlink()
            answers.append(is_over())
            here = plan.is_over
            plan.withdraw()
            answers.append(is_over())
            core_in.close()
    finally:
        plan.withdraw()
    assert (answers, here) == (["False", "False", "True"], False)


def test_a_mark_that_cannot_be_made_keeps_nobody_from_recording(tmp_path: Path):
    plan = CorePlan("steps", "/rings", 64, "/run", None, "s", "00", os.getpid(), str(tmp_path / "no" / "mark"))
    published = plan.publish()
    assert not published.mark
    assert not published.is_over
    published.withdraw()
