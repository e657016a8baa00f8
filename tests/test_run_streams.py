"""The command line where standard output or error is closed, full, or read by nobody: ``kvhook run`` ends as its
program does, and no verb takes that for a fault of its own."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import kvhook
from tests.conftest import ROOT
from tests.standin import fake_vllm, step_stats

TRACE = ROOT / "tests" / "data" / "engine-0.32.0-full.kvh"
STATES = ("closed", "full", "unread")


def put(number: int, state: str) -> None:
    """Bring a stream of this process into a state."""
    os.close(number)
    if state == "full":
        assert os.open("/dev/full", os.O_WRONLY) == number
        os.set_inheritable(number, True)
    elif state == "unread":
        read, write = os.pipe()
        os.dup2(write, number)
        for other in {read, write} - {number}:
            os.close(other)


def started(argv: list[str], folder: Path, streams: dict[int, str]) -> subprocess.CompletedProcess[bytes]:
    """A program whose streams are in these states. An error stream that is usable is kept."""

    def prepare() -> None:
        for number, state in sorted(streams.items()):
            put(number, state)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    return subprocess.run(
        argv,
        cwd=folder,
        # output is collected, as usual: unbuffered, a write fails in the middle of a verb
        env={**os.environ, "PYTHONPATH": str(ROOT), "KVHOOK_DIR": str(folder / "rings"), "PYTHONUNBUFFERED": ""},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        preexec_fn=prepare,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("stream", [1, 2])
@pytest.mark.parametrize("end", ["os._exit(0)", "os._exit(5)", "os.kill(os.getpid(), 9)"])
def test_the_exit_code_is_the_program_s_whatever_becomes_of_the_streams(
    tmp_path: Path, state: str, stream: int, end: str
):
    program = [sys.executable, "-c", f"import os; {end}"]
    alone = started(program, tmp_path, {stream: state})
    recorded = started([sys.executable, "-m", "kvhook", "run", "--", *program], tmp_path, {stream: state})
    assert recorded.returncode == alone.returncode
    assert b"error in kvhook" not in recorded.stdout + recorded.stderr


def test_what_kvhook_says_does_not_come_on_the_output_of_a_program_without_an_error_stream(tmp_path: Path):
    program = [sys.executable, "-c", "print('mine')"]
    done = started([sys.executable, "-m", "kvhook", "run", "--", *program], tmp_path, {2: "closed"})
    assert (done.returncode, done.stdout) == (0, b"mine\n")


def test_a_program_that_is_not_there_has_a_shell_s_code_without_an_error_stream(tmp_path: Path):
    done = started([sys.executable, "-m", "kvhook", "run", "--", "no-such-program"], tmp_path, {2: "full"})
    assert done.returncode == 127


def test_a_fault_in_what_is_told_at_the_end_leaves_the_exit_code_alone(tmp_path: Path):
    code = (
        "import sys, kvhook.launch.traces as t; from kvhook.cli import main; t.traces_of = lambda *_: 1 / 0; "
        "sys.exit(main(['run', '--', 'sh', '-c', 'exit 9']))"
    )
    done = started([sys.executable, "-c", code], tmp_path, {})
    assert done.returncode == 9
    assert b"ZeroDivisionError: division by zero" in done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the trace of a run."""
    folder = tmp_path_factory.mktemp("run")
    kvhook.uninstall()
    with fake_vllm() as vllm, kvhook.install(ring_dir=folder / "rings", trace=folder / "run.kvh"):
        engine = vllm.engine()
        engine.plan += [step_stats(generated=n, kv_cache_usage=0.5) for n in range(5)]
        for _ in range(5):
            engine.step()
    return folder


#: What is typed -> the exit code it has where everything can be read.
TYPED: dict[str, int] = {
    "--help": 0,
    "no-such-verb": 2,
    "summary run.kvh": 0,
    "summary run.kvh --fail-if steps>1": 3,
    "summary no.kvh": 1,
    "ls": 0,
    "tail RING": 0,
}


def verbs(typed: str, folder: Path) -> list[str]:
    ring = next((folder / "rings").glob("*.ring"))
    return [sys.executable, "-m", "kvhook", *(str(ring) if word == "RING" else word for word in typed.split())]


@pytest.mark.parametrize("typed", TYPED)
@pytest.mark.parametrize("state", STATES)
def test_a_verb_without_an_error_stream_ends_as_with_one(folder: Path, state: str, typed: str):
    usual = subprocess.run(verbs(typed, folder), cwd=folder, capture_output=True, check=False, env=environment(folder))
    done = started(verbs(typed, folder), folder, {2: state})
    assert done.returncode == usual.returncode
    assert usual.returncode == TYPED[typed]
    assert b"Traceback" not in done.stdout


@pytest.mark.parametrize("typed", TYPED)
@pytest.mark.parametrize("state", STATES)
def test_a_verb_whose_output_nobody_gets_says_so_in_one_line(folder: Path, state: str, typed: str):
    done = started(verbs(typed, folder), folder, {1: state})
    said = done.stderr.decode()
    assert "Traceback" not in said
    assert "Exception ignored" not in said
    assert "error in kvhook" not in said
    code = TYPED[typed]
    if state == "full" and not code:
        assert (done.returncode, said.count("standard output cannot be written: No space left")) == (1, 1)
    else:
        assert done.returncode == code


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "KVHOOK_DIR": str(folder / "rings")}


@pytest.mark.parametrize("state", ["closed", "full"])
def test_the_summary_at_the_end_of_a_program_leaves_its_exit_code_alone(tmp_path: Path, state: str):
    """With KVHOOK=1, without ``kvhook run``: the summary is printed by the program itself."""
    script = [sys.executable, str(ROOT / "tests/run_script.py"), "exit"]
    done = started(["env", "KVHOOK=1", f"KVHOOK_TRACE={tmp_path}/run.kvh", *script], tmp_path, {2: state})
    assert done.returncode == 3
    assert done.stdout == b"input: \n"


@pytest.mark.parametrize("files", [1, 60], ids=["little output", "much output"])
@pytest.mark.parametrize("wrong", ["", "steps > 1"], ids=["nothing to fail by", "a condition that holds"])
def test_a_verb_whose_reader_has_gone_ends_with_its_own_exit_code(files: int, wrong: str):
    """``kvhook summary ... --fail-if ... | head -1`` with pipefail: the job fails if the condition holds."""
    command = [sys.executable, "-m", "kvhook", "summary", "--json", *[str(TRACE)] * files]
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as out:
        done = subprocess.run(
            [*command, *(["--fail-if", wrong] if wrong else [])],
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == (3 if wrong else 0)
    assert ("steps > 1: true" in done.stderr) == bool(wrong)
    assert "Traceback" not in done.stderr
