"""``kvhook run``: the program behaves as without it, and what its engines did is told when it has ended."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import kvhook
from kvhook.cli import VERBS, main
from kvhook.errors import KvhookError
from kvhook.launch.interpreter import command_of, interpreter_of, lacks_kvhook
from kvhook.options import Options
from kvhook.recording.from_environment import completed, file_in, is_on
from kvhook.text.afterwards import next_commands
from tests.conftest import ROOT

SCRIPT = ROOT / "tests/run_script.py"
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Starts a program with its arguments, under ``kvhook run`` if options of that are given."""

    def begin(*program: str, options: list[str] | None = None, **environment: str) -> subprocess.Popen[str]:
        run = [] if options is None else [sys.executable, "-m", "kvhook", "run", *options, "--"]
        return subprocess.Popen(
            [*run, *program],
            env={**os.environ, "PYTHONPATH": str(ROOT), "KVHOOK_DIR": str(tmp_path / "rings"), **environment},
            cwd=tmp_path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return begin


def script(*arguments: str) -> list[str]:
    return [sys.executable, str(SCRIPT), *arguments]


@pytest.mark.parametrize(
    ("end", "code"), [("exit", 3), ("raise", 1), ("kill", -signal.SIGKILL), ("crash", -signal.SIGSEGV)]
)
def test_exit_code_and_output_are_the_script_s_and_the_summary_comes_however_it_ends(
    start: Start, tmp_path: Path, end: str, code: int
):
    run = start(*script(end), options=["--trace", "run.kvh"])
    out, err = run.communicate("hello", timeout=60)
    assert run.returncode == code
    assert out == "input: hello\n"
    assert "5 steps" in err
    assert "KV cache        peak 40.0 %" in err
    assert "kvhook summary run.kvh" in err
    assert ("kvhook autopsy run.kvh" in err) == (code != 0)
    trace = kvhook.open(tmp_path / "run.kvh")
    assert trace.steps()["num_running_reqs"].tolist() == [0, 1, 2, 3, 4]
    if code < 0:
        assert f"was ended by {signal.Signals(-code).name}" in err


def test_what_only_the_ring_of_a_killed_script_holds_is_added(start: Start, tmp_path: Path):
    run = start(*script("_exit"), options=["--trace", "run.kvh"])
    _, err = run.communicate("", timeout=60)
    assert run.returncode == 7
    assert len(kvhook.open(tmp_path / "run.kvh").steps()) == 5
    assert "records that process" in err


def test_the_file_for_prometheus_has_engines_that_a_shell_of_the_program_started(start: Start, tmp_path: Path):
    command = shlex.join(script("file", "out.prom"))
    run = start("sh", "-c", f"{command}; true", options=["--quiet", "--textfile", "out.prom"])
    run.communicate("", timeout=60)
    assert run.returncode == 0
    assert re.search(r"^kvhook_steps_total{.*} 5$", (tmp_path / "out.prom").read_text(), re.MULTILINE)


def test_a_signal_that_is_sent_to_kvhook_run_reaches_the_script_once(start: Start, tmp_path: Path):
    run = start(*script("signal"), options=["--trace", "run.kvh"])
    assert run.stdin is not None
    run.stdin.close()
    run.stdin = None
    await_ready(run, tmp_path)
    run.send_signal(signal.SIGTERM)
    out, err = run.communicate(timeout=60)
    assert out == "input: \ncaught SIGTERM\n"
    assert run.returncode == 41
    assert "5 steps" in err


def test_ctrl_c_interrupts_the_script_and_the_summary_is_printed(start: Start, tmp_path: Path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run = start(*script("ctrl-c"), options=["--trace", "run.kvh"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert run.stdin is not None
    run.stdin.close()
    run.stdin = None
    await_ready(run, tmp_path)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == -signal.SIGINT
    assert err.count("KeyboardInterrupt") == 1
    assert "5 steps" in err


def await_ready(run: subprocess.Popen[str], folder: Path) -> None:
    until = time.monotonic() + 60
    while not (folder / "ready").exists():
        assert run.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize(("way", "steps"), [("fork", [5, 3]), ("subprocess", [5, 5])])
def test_processes_of_the_script_have_files_of_their_own_and_one_summary(
    start: Start, tmp_path: Path, way: str, steps: list[int]
):
    run = start(*script(way), options=["--trace", "run.kvh"])
    _, err = run.communicate("", timeout=60)
    assert run.returncode == 0
    traces = sorted(tmp_path.glob("run*.kvh"))
    assert [len(kvhook.open(path).steps()) for path in sorted(traces, key=lambda p: len(p.name))] == steps
    assert f"{sum(steps)} steps of 2 engines" in err
    assert err.count("kvhook summary run.kvh run-pid") == 1


def test_a_script_that_becomes_another_program_is_recorded_in_both(start: Start, tmp_path: Path):
    run = start(*script("exec"), options=["--trace", "run.kvh"])
    _, err = run.communicate("", timeout=60)
    assert run.returncode == 3
    assert "10 steps of 2 engines" in err


def test_a_script_that_installs_kvhook_itself_is_recorded_once(start: Start, tmp_path: Path):
    run = start(*script("install"), options=["--trace", "run.kvh"])
    out, err = run.communicate("", timeout=60)
    assert "its own install: run.kvh" in out
    assert "5 steps in" in err


def test_a_folder_takes_a_file_from_each_process(start: Start, tmp_path: Path):
    run = start(*script("subprocess"), options=["--trace", "fleet/", "--textfile", "kvhook.prom"])
    _, err = run.communicate("", timeout=60)
    assert len(list((tmp_path / "fleet").glob("run_script-*.kvh"))) == 2
    assert "10 steps of 2 engines" in err
    assert (tmp_path / "kvhook.prom").exists()  # what stands in it: test_top.py


def test_without_a_trace_it_records_into_a_file_of_that_name(start: Start, tmp_path: Path):
    run = start(*script("nothing"), options=["--level", "light", "--core", "off", "--label", "agent-7"])
    _, err = run.communicate("", timeout=60)
    assert run.returncode == 0
    (path,) = tmp_path.glob("kvhook-run_script-*.kvh")
    assert kvhook.open(path).meta["engines"][0]["adapter"] == "v1-light"
    assert f"recorded in {path.name}" in err


def test_quiet_prints_nothing(start: Start):
    run = start(*script("exit"), options=["--trace", "run.kvh", "--quiet"])
    _, err = run.communicate("", timeout=60)
    assert err == ""


def test_a_program_without_an_engine_is_told_of(start: Start):
    run = start(*script("nothing", "--no-engine"), options=["--trace", "run.kvh"])
    _, err = run.communicate("", timeout=60)
    assert run.returncode == 0
    assert "nothing was recorded" in err


def test_plugins_that_are_restricted_are_said_before_and_after(start: Start):
    run = start(*script("nothing", "--no-engine"), options=["--trace", "run.kvh"], VLLM_PLUGINS="mine")
    _, err = run.communicate("", timeout=60)
    assert "VLLM_PLUGINS=mine,kvhook" in err.splitlines()[0]
    assert "nothing was recorded: VLLM_PLUGINS is set and does not name kvhook" in err


@pytest.mark.parametrize(("program", "code"), [("no-such-program", 127), ("/etc/passwd", 126)])
def test_a_program_that_cannot_be_started_gives_the_code_of_a_shell(start: Start, program: str, code: int):
    run = start(program, options=[])
    _, err = run.communicate("", timeout=60)
    assert run.returncode == code
    assert program in err


def test_arguments_that_look_like_kvhook_s_are_the_script_s(start: Start):
    code = "import sys; print(sys.argv[1:])"
    run = start(sys.executable, "-c", code, "--trace", "x", "--", "--level", options=["--quiet"])
    out, _ = run.communicate("", timeout=60)
    assert out == "['--trace', 'x', '--', '--level']\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["run"], "say what to run"),
        (["run", "--trace", "no/such/folder/x.kvh", "--", "true"], "there is no directory"),
        (["run", "--trace", __file__.removesuffix(".py") + ".kvh", "true"], ""),
    ],
)
def test_mistakes_are_said_before_the_program_starts(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, argv: list[str], message: str
):
    if not message:
        (tmp_path / "there.kvh").touch()
        argv[2], message = str(tmp_path / "there.kvh"), "exists"
    assert main(argv) == 1
    assert message in capfd.readouterr().err


# ---- KVHOOK=1, without kvhook run ----------------------------------------------------------------------------------


def test_the_variable_alone_records_and_prints_the_summary_at_the_end(start: Start, tmp_path: Path):
    run = start(*script("exit"), KVHOOK="1", KVHOOK_TRACE="mine.kvh")
    out, err = run.communicate("x", timeout=60)
    assert run.returncode == 3
    assert out == "input: x\n"
    assert "5 steps" in err
    assert "kvhook summary" in err
    assert len(kvhook.open(tmp_path / "mine.kvh").steps()) == 5


@pytest.mark.parametrize("more", [{}, {"KVHOOK": "0"}])
def test_without_the_variable_nothing_is_recorded(start: Start, tmp_path: Path, more: dict[str, str]):
    run = start(*script("nothing"), KVHOOK_TRACE="mine.kvh", **more)
    _, err = run.communicate("", timeout=60)
    assert err == ""
    assert not (tmp_path / "mine.kvh").exists()
    assert not (tmp_path / "rings").exists()


def test_a_wrong_variable_is_a_warning_and_the_script_goes_on(start: Start):
    run = start(*script("exit"), KVHOOK="1", KVHOOK_LEVEL="loud")
    _, err = run.communicate("", timeout=60)
    assert run.returncode == 3
    assert "nothing is recorded: level='loud'" in err
    assert "Traceback" not in err


def test_processes_that_work_for_an_engine_are_left_alone(tmp_path: Path, python):
    """The core of an engine that another process makes, and its workers: vLLM loads plug-ins there too."""
    code = """
import sys, types
from kvhook.plugin import load
for name in ("vllm.v1.engine.core", "vllm.v1.worker.worker_base", "vllm.model_executor.models.registry"):
    module = types.ModuleType(name)
    module.load = load
    exec("def begin(): load()", vars(module))
    module.begin()
print(sorted(name for name in sys.modules if name.startswith("kvhook")))
from kvhook.recording.installation import current_session
print(current_session())
"""
    out = python(code, KVHOOK="1").stdout.splitlines()
    assert "kvhook.recording.installation" not in out[0]
    assert out[1] == "None"


def test_options_that_are_given_win_over_the_environment(tmp_path: Path):
    environment = {"KVHOOK": "1", "KVHOOK_TRACE": "env.kvh", "KVHOOK_LEVEL": "light", "KVHOOK_CORE": "blocks"}
    given = completed(Options(trace="mine.kvh", core="off"), environment)
    assert (given.trace, given.level, given.core) == ("mine.kvh", "light", "off")
    assert completed(Options(), environment).trace == "env.kvh"
    assert completed(Options(), {**environment, "KVHOOK": "0"}) == Options()
    labels = completed(Options(), {**environment, "KVHOOK_LABEL": "agent-7"}).labels
    assert callable(labels)
    assert labels("17") == "agent-7"
    assert completed(Options(labels="/"), {**environment, "KVHOOK_LABEL": "agent-7"}).labels == "/"
    assert [is_on({"KVHOOK": value}) for value in ("1", "yes", "0", "no", "")] == [True, True, False, False, False]


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(KvhookError, match="cannot be made"):
        file_in(f"{tmp_path}/file/folder/")


# ---- the pieces ----------------------------------------------------------------------------------------------------


def test_the_python_of_a_command_is_found(tmp_path: Path):
    tool = tmp_path / "tool"
    tool.write_text(f"#!{sys.executable}\nprint(1)\n")
    tool.chmod(0o755)
    assert interpreter_of([str(tool)]) == sys.executable
    assert interpreter_of([sys.executable, "x.py"]) == sys.executable
    assert interpreter_of(["ls"]) == ""
    plain = tmp_path / "plain.py"
    plain.touch()
    assert command_of([str(plain), "-v"]) == [sys.executable, str(plain), "-v"]
    assert command_of([str(tool)]) == [str(tool)]


def test_a_python_without_the_plugin_is_known(tmp_path: Path):
    for name, code in (("without", 9), ("with", 0), ("broken", 1)):
        fake = tmp_path / name
        fake.write_text(f"#!/bin/sh\nexit {code}\n")
        fake.chmod(0o755)
    assert lacks_kvhook(str(tmp_path / "without"))
    assert not lacks_kvhook(str(tmp_path / "with"))
    assert not lacks_kvhook(str(tmp_path / "broken"))
    assert not lacks_kvhook(str(tmp_path / "none"))


@pytest.mark.parametrize("traces", [["a b.kvh"], ["a.kvh", "b.kvh"], [f"f/{n}.kvh" for n in range(9)]])
def test_the_commands_that_are_proposed_exist(traces: list[str]):
    text = next_commands(traces, ended_badly=True)
    verbs = {verb for group in VERBS.values() for verb in group}
    commands = [shlex.split(line, comments=True) for line in text.splitlines()[1:]]
    assert {words[1] for words in commands} <= verbs
    assert {words[0] for words in commands} == {"kvhook"}
    assert max(map(len, text.splitlines())) < 200
