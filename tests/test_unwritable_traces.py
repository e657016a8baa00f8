"""A trace that cannot be written: it is said before a program is started, and otherwise the end says what is true."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import kvhook
from kvhook.cli import main
from kvhook.errors import KvhookError
from kvhook.launch.textfile import replace_text
from kvhook.recording.from_environment import file_in
from kvhook.text.afterwards import next_commands, quoted
from tests.conftest import ROOT
from tests.standin import fake_vllm, play, step_stats
from tests.test_run import Start, script, start

__all__ = ["start"]  # a fixture


@pytest.mark.parametrize(
    ("trace", "says"),
    [
        ("/proc/run.kvh", "nothing can be written in /proc"),
        ("/proc/folder/", "the folder cannot be made"),
        ("/proc", "nothing can be written in /proc"),
        ("words.txt", "there is a file of this name"),
        ("words.txt/run.kvh", "there is no directory"),
        ("words.txt/sub", "the folder cannot be made: Not a directory"),
        ("words.kvh/", "there is a file of this name"),
        ("words.kvh", "exists"),
        ("dangling.kvh", "exists"),
        (f"{'a' * 260}.kvh", "the name of the file has 264 bytes"),
        (f"{'a' * 300}/run.kvh", "File name too long"),
        (".kvh", "there is no name before .kvh"),
        ("", "the path is empty"),
        ("run.csv", "a trace ends in .kvh; if this is to be a folder, say run.csv/"),
        ("new/run.parquet", "a trace ends in .kvh; if this is to be a folder, say new/run.parquet/"),
    ],
)
def test_kvhook_run_says_so_before_the_program_starts(
    trace: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    for name in ("words.txt", "words.kvh"):
        (tmp_path / name).write_text("hello\n")
    (tmp_path / "dangling.kvh").symlink_to("nowhere")
    assert main(["run", "--trace", trace, "--", "touch", "started"]) == 1
    said = capfd.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    assert not (tmp_path / "started").exists()
    assert sorted(os.listdir(tmp_path)) == ["dangling.kvh", "words.kvh", "words.txt"]


@pytest.mark.parametrize("folder", ["run.csv/", "there.csv", "traces-2026.11", "fleet"])
def test_what_is_a_folder_stays_one(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "there.csv").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["generate.py"])
    assert file_in(folder) == tmp_path / folder / f"generate-{os.getpid()}.kvh"
    assert (tmp_path / folder).is_dir()


def test_the_variable_refuses_what_the_option_does(tmp_path: Path):
    with pytest.raises(KvhookError, match=r"KVHOOK_TRACE=.*run\.csv: a trace ends in \.kvh"):
        file_in(f"{tmp_path}/run.csv")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("textfile", "says"),
    [
        ("", "the path is empty"),
        (".", "it is a directory"),
        ("folder", "it is a directory"),
        ("folder/", "it is a directory"),
        ("new/", "this names a folder"),
        ("link.prom", "it is a symbolic link"),
        ("pipe.prom", "it is a pipe"),
        ("no/such/k.prom", "there is no directory"),
        ("/proc/k.prom", "nothing can be written in /proc"),
        (f"{'a' * 256}", "File name too long"),
    ],
)
def test_a_textfile_that_cannot_be_written_is_refused_before_the_program_starts(
    textfile: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.prom").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.prom")
    assert main(["run", "--textfile", textfile, "--", "touch", "started"]) == 1
    said = capfd.readouterr().err
    assert says in said
    assert said.startswith("kvhook run: --textfile")
    assert said.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["folder", "link.prom", "pipe.prom"]


@pytest.mark.parametrize("name", ["a" * 255, "é" * 127])
def test_a_textfile_with_a_long_name_is_written_and_others_can_read_it(name: str, tmp_path: Path):
    before = os.umask(0o077)
    try:
        replace_text(tmp_path / name, "text")
    finally:
        os.umask(before)
    assert (tmp_path / name).read_text() == "text"
    assert (tmp_path / name).stat().st_mode & 0o777 == 0o644
    assert os.listdir(tmp_path) == [name]


GONE = "import os, sys; os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone'); "


@pytest.mark.parametrize("trace", ["x.kvh", "x/"])
@pytest.mark.parametrize("way", ["option", "variable", "install", "textfile"])
def test_a_current_directory_that_has_been_removed_is_named(way: str, trace: str, start: Start, tmp_path: Path):
    variables, says = {}, "trace='x.kvh': "
    code = "from tests import run_script as r; r.load()"
    if way in ("option", "textfile"):
        words = ["--trace", trace] if way == "option" else ["--trace", f"{tmp_path}/{trace}", "--textfile", trace[0]]
        code = f"from kvhook.cli import main; sys.exit(main(['run', *{words}, '--', 'touch', '{tmp_path}/started']))"
        says = f"--trace={trace!r}: " if way == "option" else "--textfile='x': "
    elif way == "variable":
        variables = {"KVHOOK": "1", "KVHOOK_TRACE": trace}
        says = says if trace == "x.kvh" else f"KVHOOK_TRACE={trace!r}: "
    else:
        code = "import kvhook\ntry: kvhook.install(trace='x.kvh')\nexcept kvhook.KvhookError as e: sys.exit(str(e))"
    done = start(sys.executable, "-c", f"{GONE}\n{code}", **variables)
    _, said = done.communicate("", timeout=120)
    assert f"{says}the current directory has been removed" in said
    assert "Traceback" not in said
    assert done.returncode == (0 if way == "variable" else 1)
    assert not (tmp_path / "started").exists()


def test_a_slash_at_the_end_means_a_folder_as_in_the_variable(start: Start, tmp_path: Path):
    for runs in (1, 2):
        done = start(*script("nothing"), options=["--trace", "x.kvh/"])
        _, err = done.communicate("", timeout=120)
        assert "5 steps" in err
        assert len(list((tmp_path / "x.kvh").glob("run_script-*.kvh"))) == runs


def test_a_program_with_a_long_name_is_recorded(start: Start, tmp_path: Path):
    name = tmp_path / f"{'é' * 120}.py"
    name.write_text((ROOT / "tests/run_script.py").read_text())
    done = start(sys.executable, str(name), "nothing", options=["--core", "off"])
    _, err = done.communicate("", timeout=120)
    assert "5 steps" in err


def test_a_folder_that_vanishes_while_the_program_runs_is_told_at_the_end(start: Start, tmp_path: Path):
    (tmp_path / "gone").mkdir()
    code = "import os, sys; from tests import run_script as r; vllm = r.VLLM.__enter__(); r.load(); os.rmdir('gone'); "
    code += "r.step(vllm, 5); sys.exit(3)"
    done = start(sys.executable, "-c", code, options=["--trace", "gone/run.kvh"])
    out, err = done.communicate("", timeout=120)
    assert (done.returncode, out) == (3, "")
    assert "no vLLM engine was made" not in err
    told = err[err.index("nothing was recorded: ") :]
    assert f"{tmp_path}/gone/run.kvh could not be written: nothing can be written in {tmp_path}/gone" in told
    # five steps and what they gave are still to be had, by the command that is proposed
    pid = told.partition("kvhook summary ")[2].partition(",")[0]
    proposed = [sys.executable, "-m", "kvhook", "summary", pid]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "KVHOOK_DIR": str(tmp_path / "rings")}
    shown = subprocess.run(proposed, env=environment, capture_output=True, text=True, check=True)
    assert "5 steps" in shown.stdout


def test_a_session_whose_trace_cannot_be_written_says_why_and_what_is_lost(fresh: Path):
    with fake_vllm() as vllm, kvhook.install(trace="/proc/run.kvh") as session:
        play(vllm.engine(), *(step_stats(kv_cache_usage=n / 10, num_running_reqs=n) for n in range(5)))
        shown = str(session.summary())
        assert "/proc/run.kvh could not be written (FileNotFoundError" in shown
        assert "5 records are lost" in shown
        assert "the trace holds none" not in shown
        health = session.health()
        assert (health.ok, health.records_lost) == (False, 5)
        assert "/proc/run.kvh could not be written" in str(health)
        (ring,) = session.rings
        assert kvhook.open(ring).steps()["num_running_reqs"].tolist() == [0, 1, 2, 3, 4]


def test_another_s_file_in_the_place_of_the_trace_is_no_error(fresh: Path):
    (fresh / "run.kvh").write_text("somebody else's")
    with fake_vllm() as vllm, kvhook.install(trace=fresh / "run.kvh") as session:
        play(vllm.engine(), step_stats())
    assert len(session.steps()) == 1
    assert (fresh / "run.kvh").read_text() == "somebody else's"


@pytest.mark.parametrize(
    "name", [b"plain.kvh", b"a b.kvh", b"it's.kvh", b"\xff\xfe.kvh", b"\xff'\\x.kvh", b"a\nb.kvh", "é.kvh".encode()]
)
def test_the_commands_that_are_proposed_name_the_file_to_a_shell(name: bytes):
    text = os.fsdecode(name)
    typed = quoted(text)
    typed.encode()  # nothing that cannot be typed
    assert typed.isprintable()
    shell = subprocess.run(["bash", "-c", f"printf %s {typed}"], capture_output=True, check=True)
    assert shell.stdout == name
    assert (typed == shlex.quote(text)) == text.isprintable()
    assert f"kvhook summary {typed} " in next_commands([text])
