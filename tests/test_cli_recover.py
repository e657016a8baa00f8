"""``kvhook recover``: what only the ring still holds comes into the trace."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import kvhook
from kvhook.cli import main
from kvhook.discovery.recovery import recover
from kvhook.errors import KvhookError
from tests.conftest import ROOT
from tests.ring.synthetic import Recording


@pytest.fixture
def crashed(tmp_path: Path) -> tuple[Recording, Path]:
    """100 steps and two requests, of which 60 records are in the trace, and the last 63 in the ring."""
    recording = Recording(tmp_path / "rings", slots=64).run(40)
    recording.finish(3)
    recording.run(10)
    path = tmp_path / "run.kvh"
    # the ring is read while it holds what the spool has taken: the first 51 records
    recording.run(9)
    recording.spool_to(path, 60)
    recording.finish(4)
    recording.run(41)
    recording.die()
    # the trace names the process as it was when it wrote
    with open(path, "r+b") as file:
        from kvhook.ring.layout import seal

        head = bytearray(file.read(256))
        head[48:56] = (recording.start + 1).to_bytes(8, "little")
        file.seek(0)
        file.write(seal(head))
    return recording, path


def test_the_trace_is_completed_in_place(
    crashed: tuple[Recording, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    _, path = crashed
    before = kvhook.open(path)
    assert (len(before.steps()), len(before.requests())) == (59, 1)
    assert main(["recover", str(path), "--dir", str(tmp_path / "rings")]) == 0
    assert capsys.readouterr().out == f"{path}: engine 0: 42 records added\n"
    whole = kvhook.open(path)
    assert whole.steps()["step"].tolist() == list(range(100))
    assert whole.steps()["num_generation_tokens"].tolist() == list(range(100))
    assert whole.requests()["request_id"].tolist() == [3, 4]
    summary = whole.summary()
    assert (summary.steps, summary.records_lost, summary.model) == (100, 0, "tiny-llama")
    assert whole.meta["engines"][0]["recovered"] == 42
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["run.kvh"]


def test_a_trace_is_opened_with_what_is_still_in_the_ring_and_says_so(
    crashed: tuple[Recording, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    _, path = crashed
    short = kvhook.open(path)
    assert len(short.steps()) == 59
    # nobody has told where the rings are
    assert "its ring is not there: the last second of it may be missing" in short.meta["not_closed"]
    monkeypatch.setenv("KVHOOK_DIR", str(tmp_path / "rings"))
    whole = kvhook.open(path)
    assert whole.steps()["step"].tolist() == list(range(100))
    assert whole.steps()["num_generation_tokens"].tolist() == list(range(100))
    assert whole.requests()["request_id"].tolist() == [3, 4]
    assert (whole.meta["records_lost"], whole.meta["damaged"]) == (0, 0)
    assert "ended without closing" in whole.summary().not_closed
    assert main(["summary", str(path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "not closed process" in said
    assert f"42 of its records are still in its ring: kvhook recover {path} moves them" in said
    assert main(["export", str(path), str(tmp_path / "run.csv")]) == 0
    assert kvhook.open(tmp_path / "run.csv").meta["not_closed"] == whole.meta["not_closed"]
    together = kvhook.open(path, ROOT / "tests" / "data" / "engine-0.32.0-full.kvh")
    assert together.meta["not_closed"] == whole.meta["not_closed"]
    before, facts = whole.summary().as_dict(), whole.meta["engines"]
    assert main(["recover", str(path)]) == 0
    recovered = kvhook.open(path)
    assert recovered.meta["not_closed"] == ""
    assert recovered.meta["engines"] == facts
    assert recovered.summary().as_dict() == before | {"not_closed": ""}


def test_what_a_killed_process_has_recorded_is_opened_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KVHOOK_DIR", str(tmp_path / "rings"))
    code = """
import os, signal
import kvhook
from tests.standin import fake_vllm, step_stats
with fake_vllm() as vllm:
    kvhook.install(trace="run.kvh", core="off")
    engines = [vllm.engine(), vllm.engine()]
    for n in range(40):
        for engine in engines:
            engine.plan.append(step_stats(generated=n))
            engine.step()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, timeout=120, check=False)
    assert done.returncode == -9
    trace = kvhook.open(tmp_path / "run.kvh")
    for engine in (0, 1):
        assert trace.steps(engine)["num_generation_tokens"].tolist() == list(range(40))
    assert trace.meta["records_lost"] == 0


def test_several_files_a_folder_and_a_pattern(
    crashed: tuple[Recording, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    _, path = crashed
    rings = ["--dir", str(tmp_path / "rings")]
    text = tmp_path / "text.kvh"
    text.write_text("no trace")
    before = path.read_bytes()
    assert main(["recover", str(text), str(path), *rings]) == 1
    said = capsys.readouterr().out.splitlines()
    assert "text.kvh" in said[0]
    assert said[1:] == [f"{path}: engine 0: 42 records added"]
    text.unlink()
    for several in (str(tmp_path), str(tmp_path / "*.kvh")):
        path.write_bytes(before)
        assert main(["recover", several, *rings]) == 0
        assert capsys.readouterr().out == f"{path}: engine 0: 42 records added\n"
    assert main(["recover", str(path), str(path), "--out", str(tmp_path / "other.kvh"), *rings]) == 1
    assert "--out takes one file, and these are 2" in capsys.readouterr().err


def test_twice_is_once(crashed: tuple[Recording, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    _, path = crashed
    for _ in range(2):
        assert main(["recover", str(path), "--dir", str(tmp_path / "rings")]) == 0
    assert "it is complete: it was closed" in capsys.readouterr().out
    assert len(kvhook.open(path).steps()) == 100


def test_out_leaves_the_trace_alone(crashed: tuple[Recording, Path], tmp_path: Path):
    _, path = crashed
    before = path.read_bytes()
    done = recover(path, [tmp_path / "rings"], tmp_path / "whole.kvh")
    assert (done.path, done.added) == (tmp_path / "whole.kvh", {0: 42})
    assert path.read_bytes() == before
    assert len(kvhook.open(tmp_path / "whole.kvh").steps()) == 100
    with pytest.raises(KvhookError, match=r"whole\.kvh exists"):
        recover(path, [tmp_path / "rings"], tmp_path / "whole.kvh")


def test_a_trace_that_ends_in_half_a_slot_is_completed_too(crashed: tuple[Recording, Path], tmp_path: Path):
    _, path = crashed
    path.write_bytes(path.read_bytes()[:-100])
    assert recover(path, [tmp_path / "rings"]).added == {0: 43}
    trace = kvhook.open(path)
    assert trace.steps()["step"].tolist() == list(range(100))
    assert trace.meta["damaged"] == 0


def test_what_neither_has_is_counted(
    crashed: tuple[Recording, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    recording, path = crashed
    data = path.read_bytes()
    slot = recording.ring.layout.slot_bytes
    path.write_bytes(data[: -50 * slot])
    assert main(["recover", str(path), "--dir", str(tmp_path / "rings")]) == 0
    gap = 102 - 64 - 10
    assert f"64 records added; {gap} before them had been overwritten, and are lost" in capsys.readouterr().out
    assert kvhook.open(path).summary().records_lost == gap


def test_an_engine_whose_facts_did_not_reach_the_trace(tmp_path: Path):
    first = Recording(tmp_path / "rings", engine=0).run(5)
    second = Recording(tmp_path / "rings", engine=1, model="another").run(7)
    first.spool_to(tmp_path / "run.kvh", 5)
    start = int.from_bytes((tmp_path / "run.kvh").read_bytes()[48:56], "little")
    for recording in (first, second):
        recording.die()
        recording.patch(start=start)
    # the process is gone: give it a number that nobody has
    for path in (tmp_path / "run.kvh", first.path, second.path):
        from kvhook.ring.layout import seal

        data = bytearray(path.read_bytes())
        data[32:40] = (4194999).to_bytes(8, "little")
        path.write_bytes(seal(data[:256]) + bytes(data[256:]))
    assert recover(tmp_path / "run.kvh", [tmp_path / "rings"]).added == {0: 0, 1: 7}
    trace = kvhook.open(tmp_path / "run.kvh")
    assert [e["model"] for e in trace.meta["engines"]] == ["tiny-llama", "another"]
    assert len(trace.steps(1)) == 7


def test_a_running_process_completes_its_trace_itself(tmp_path: Path):
    recording = Recording(tmp_path / "rings").run(5)
    recording.spool_to(tmp_path / "run.kvh", 3)
    with pytest.raises(KvhookError, match=f"process {os.getpid()} still runs and writes"):
        recover(tmp_path / "run.kvh", [tmp_path / "rings"])


def test_no_ring_is_left(crashed: tuple[Recording, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recording, path = crashed
    recording.path.unlink()
    before = path.read_bytes()
    assert main(["recover", str(path), "--dir", str(tmp_path / "rings")]) == 0
    assert "has left no ring, so there is nothing to add" in capsys.readouterr().out
    assert path.read_bytes() == before


def test_the_ring_of_another_process_is_not_taken(crashed: tuple[Recording, Path], tmp_path: Path):
    recording, path = crashed
    recording.patch(start=recording.start + 2)
    assert "no ring" in recover(path, [tmp_path / "rings"]).reason


def test_where_it_cannot_be_written_the_trace_is_as_it_was(crashed: tuple[Recording, Path], tmp_path: Path):
    _, path = crashed
    before = path.read_bytes()
    with pytest.raises(KvhookError, match=r"cannot write .*none/out\.kvh: No such file"):
        recover(path, [tmp_path / "rings"], tmp_path / "none" / "out.kvh")
    assert path.read_bytes() == before


def test_a_ring_is_no_trace(crashed: tuple[Recording, Path], tmp_path: Path):
    recording, _ = crashed
    with pytest.raises(KvhookError, match="is a ring, not a trace"):
        recover(recording.path, [tmp_path / "rings"])
