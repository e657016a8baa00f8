"""``kvhook run`` tells what its own program has recorded, wherever it did; and nothing of anybody else's."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

import kvhook
from kvhook.recording.launched import LaunchedRun, facts_of_runs, tell_runs
from kvhook.ring.trace_file import header_of
from tests.test_run import Start, await_ready, script, start

__all__ = ["start"]  # a fixture

#: A program that says that it has begun, and makes an engine when its input ends; or none.
WAITS = """
import sys
from tests import run_script
open("ready", "w").close()
sys.stdin.read()
if sys.argv[1:] != ["--no-engine"]:
    run_script.work()
"""


def program(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


def own_install(trace: str) -> list[str]:
    """A program that says itself where it records."""
    code = "import sys, kvhook; from tests import run_script; vllm = run_script.VLLM.__enter__(); "
    return program(f"{code} kvhook.install(trace={trace!r}); run_script.step(vllm, 5)")


@pytest.fixture(autouse=True)
def lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where commands have their lists, and histories are; empty afterwards."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr("tempfile.tempdir", None)  # what it has found before
    return tmp_path / "temporary"


@pytest.mark.parametrize(("trace", "other"), [("fleet/", "fleet/"), ("run.kvh", "run2.kvh"), ("run.kvh", "run.kvh")])
def test_another_run_at_the_same_time_is_not_counted(start: Start, tmp_path: Path, trace: str, other: str):
    first = start(*program(WAITS), options=["--trace", trace])
    await_ready(first, tmp_path)
    _, said = start(*script("nothing"), options=["--trace", other]).communicate("", timeout=120)
    assert "5 steps in" in said
    _, said = first.communicate("", timeout=120)
    assert "5 steps in" in said
    assert "of 2 engines" not in said
    assert len(list(tmp_path.glob("fleet/*.kvh") if trace == "fleet/" else tmp_path.glob("run*.kvh"))) == 2


def test_a_program_without_an_engine_has_not_recorded_what_others_have(start: Start, tmp_path: Path):
    first = start(*program(WAITS, "--no-engine"), options=["--trace", "fleet/"])
    await_ready(first, tmp_path)
    start(*script("nothing"), KVHOOK="1", KVHOOK_TRACE="fleet/").communicate("", timeout=120)
    assert len(list(tmp_path.glob("fleet/*.kvh"))) == 1
    _, said = first.communicate("", timeout=120)
    assert "nothing was recorded: no vLLM engine was made" in said


@pytest.mark.parametrize("asked", [["--trace", "asked.kvh"], ["--trace", "fleet/"], [], ["--anonymous"]], ids=str)
def test_a_trace_that_the_program_names_itself_is_told(start: Start, tmp_path: Path, asked: list[str]):
    (tmp_path / "elsewhere").mkdir()
    _, said = start(*own_install("elsewhere/own.kvh"), options=asked).communicate("", timeout=120)
    assert "5 steps in" in said
    assert "recorded in elsewhere/own.kvh\n" in said
    assert "nothing was recorded" not in said


@pytest.mark.parametrize("end", ["nothing", "_exit"])
@pytest.mark.parametrize("inner", [[], ["--trace", "inner/"]], ids=str)
def test_a_run_in_a_run_is_told_by_both(start: Start, tmp_path: Path, inner: list[str], end: str):
    """Also if the inner one had to complete the trace of a program that left its last records in the ring."""
    nested = [sys.executable, "-m", "kvhook", "run", *inner, "--", *script(end)]
    _, said = start(*nested, options=["--trace", "outer.kvh"]).communicate("", timeout=120)
    assert said.count("5 steps in") == 2
    (name,) = set(re.findall("recorded in (.*)", said))
    assert len(kvhook.open(tmp_path / name).steps()) == 5


@pytest.mark.parametrize("session", [False, True], ids=["a child", "a daemon"])
def test_what_a_shell_in_between_starts_is_the_program_s(start: Start, tmp_path: Path, session: bool):
    code = f"import subprocess; subprocess.run(['sh', '-c', {' '.join(script('nothing'))!r} + '; true'], "
    code += f"start_new_session={session})"
    _, said = start(*program(code), options=["--trace", "run.kvh"]).communicate("", timeout=120)
    assert "5 steps in" in said


def test_rings_of_a_child_of_a_child_are_the_program_s_where_nothing_can_be_written(start: Start, tmp_path: Path):
    (tmp_path / "gone").mkdir()
    code = "import os; from tests import run_script as r; vllm = r.VLLM.__enter__(); r.load(); os.rmdir('gone'); "
    (tmp_path / "inner.py").write_text(f"{code}r.step(vllm, 5)")
    shell = ["sh", "-c", f"{sys.executable} inner.py; true"]
    _, said = start(*shell, options=["--trace", "gone/run.kvh"]).communicate("", timeout=120)
    assert f"{tmp_path}/gone/run.kvh could not be written: nothing can be written in {tmp_path}/gone" in said
    assert "records are still in the ring: kvhook summary" in said


def test_a_trace_that_the_program_has_removed_is_not_called_unwritable(start: Start, tmp_path: Path):
    code = "import os, kvhook; from tests import run_script as r; vllm = r.VLLM.__enter__(); "
    code += "session = kvhook.install(trace='own.kvh'); r.step(vllm, 5); session.close(); os.remove('own.kvh')"
    _, said = start(*program(code), options=["--trace", "asked.kvh"]).communicate("", timeout=120)
    assert "nothing was recorded: own.kvh is not there: it could not be written, see above, or the program" in said


def test_a_program_that_wants_no_file_is_told_so(start: Start, tmp_path: Path):
    code = "import os, kvhook; from tests import run_script as r; del os.environ['KVHOOK']; "
    code += "vllm = r.VLLM.__enter__(); kvhook.install(); r.step(vllm, 5)"
    _, said = start(*program(code), options=["--trace", "asked.kvh"]).communicate("", timeout=120)
    assert "the program recorded into no file" in said
    assert "kvhook summary" in said


def test_the_list_of_a_command_is_gone_when_it_has_ended(start: Start, lists: Path):
    for words in (script("exit"), ["no-such-program"]):
        start(*words, options=["--quiet", "--trace", f"{len(words)}.kvh"]).communicate("", timeout=120)
        assert list(lists.iterdir()) == []


def test_the_list_of_a_command_that_was_killed_is_cleaned_away(start: Start, tmp_path: Path, lists: Path):
    killed = start(*program(WAITS, "--no-engine"), options=["--trace", "run.kvh"])
    await_ready(killed, tmp_path)
    assert len(list(lists.iterdir())) == 1
    killed.kill()
    killed.communicate("", timeout=120)
    clean = start(*script("--help")[:1], "-m", "kvhook", "clean", "--all")
    clean.communicate("", timeout=120)
    assert list(lists.iterdir()) == []


def test_an_anonymous_trace_has_a_random_mark_and_no_path(start: Start, tmp_path: Path):
    start(*script("nothing"), options=["--trace", "run.kvh", "--anonymous", "--core", "off"]).communicate(
        "", timeout=120
    )
    assert re.fullmatch("[0-9a-f]{16}", header_of(tmp_path / "run.kvh").meta["kvhook_runs"])
    assert str(tmp_path).encode() not in (tmp_path / "run.kvh").read_bytes()


def test_a_process_that_no_command_started_has_no_mark(tmp_path: Path):
    for value in ("", "4711", "/tmp/kvhook-session-1-2-aa-3", "nonsense:-runxyz-1"):
        assert facts_of_runs({"KVHOOK_RUN": value}) == {}
        tell_runs(tmp_path / "run.kvh", {"KVHOOK_RUN": value})


def test_a_list_is_read_whatever_stands_in_it(tmp_path: Path, lists: Path):
    launched = LaunchedRun()
    environment = {"KVHOOK_RUN": launched.handed_down({"KVHOOK_RUN": "4711"})}
    odd = [Path(os.fsdecode(b"/there/\xff\n.kvh")), Path("/there/b.kvh")]
    tell_runs(odd[0], environment)
    (path,) = lists.iterdir()
    with path.open("ab") as file:
        file.write(b'"not/absolute"\n[1]\n{\n\xff\n"/nul/\\u0000"\n' + b"[" * 100_000 + b"\n")
    tell_runs(odd[1], environment)
    assert launched.told() == odd
    assert facts_of_runs(environment) == {"kvhook_runs": launched.mark}
    launched.end()
    launched.end()
    tell_runs(odd[0], environment)
    assert launched.told() == []
    assert not path.exists()
