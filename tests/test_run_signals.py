"""Signals under ``kvhook run``: the program gets each of them as often as without it, whoever they are sent to."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvhook.launch.child import FORWARDED
from kvhook.launch.witness import Witness
from tests.conftest import ROOT

#: Says which signals come, one after the other, and ends with SIGTERM.
PROGRAM = """
import os, signal, sys
signals = {signal.SIGHUP, signal.SIGINT, signal.SIGTERM}
signal.pthread_sigmask(signal.SIG_BLOCK, signals)
if "alone" in sys.argv:
    os.setsid()
signal.alarm(300)  # nothing else ends it where the test fails
number = 0
print("ready", flush=True)
while number != signal.SIGTERM:
    number = signal.sigwait(signals)
    print(signal.Signals(number).name, flush=True)
sys.exit(7)
"""
RUN = [sys.executable, "-m", "kvhook", "run", "--quiet", "--trace", "run/", "--"]
#: How often each is tried: one that comes twice may find the first one still waiting, and is not seen then.
TIMES = 20


@contextmanager
def started(command: Sequence[str], folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A program in a process group of its own, which has begun."""
    running = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "KVHOOK_DIR": str(folder / "rings")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert said(running) == "ready"
        yield running
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
        assert running.stdout is not None
        running.stdout.close()
        running.wait()


def said(running: subprocess.Popen[str]) -> str:
    assert running.stdout is not None
    return running.stdout.readline().rstrip("\n")


def ended(running: subprocess.Popen[str]) -> int:
    """Its exit code, after a SIGTERM to it; it says nothing more than that."""
    running.send_signal(signal.SIGTERM)
    out, _ = running.communicate(timeout=120)
    assert out == "SIGTERM\n"
    return running.returncode


@pytest.mark.parametrize("more", [[], ["alone"]], ids=["in the group", "in one of its own"])
@pytest.mark.parametrize("runs", [1, 2], ids=["a run", "a run in a run"])
def test_a_signal_to_the_group_and_one_to_the_command_reach_the_program_once(
    tmp_path: Path, runs: int, more: list[str]
):
    """Signals are taken in the order of their numbers: when SIGINT has come through, SIGHUP has been dealt with."""
    with started([*RUN * runs, sys.executable, "-c", PROGRAM, *more], tmp_path) as running:
        for _ in range(TIMES):
            os.killpg(running.pid, signal.SIGHUP)
            assert said(running) == "SIGHUP"
            running.send_signal(signal.SIGINT)
            assert said(running) == "SIGINT"
            running.send_signal(signal.SIGHUP)
            assert said(running) == "SIGHUP"
        assert ended(running) == 7


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_program_is_not_interrupted_in_its_cleaning_up(tmp_path: Path, number: signal.Signals):
    """A second Ctrl-C or SIGTERM would come while it waits for a line that says that `kvhook run` is done with it."""
    code = (
        "import signal, sys\n"
        "signal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "signal.signal(signal.SIGHUP, lambda *_: sys.exit(9))\n"
        "try:\n    print('ready', flush=True)\n    signal.pause()\n"
        "except KeyboardInterrupt:\n    print('saving', flush=True)\n    signal.pause()\n"
    )
    with started([*RUN, sys.executable, "-c", code], tmp_path) as running:
        os.killpg(running.pid, number)
        assert said(running) == "saving"
        # of two that wait, the command takes SIGHUP first: it hands it on when the other one has been dealt with, or
        # the other one has not come through at all
        running.send_signal(signal.SIGHUP)
        running.communicate(timeout=120)
        assert running.returncode == 9


def test_without_a_process_that_stands_by_signals_are_handed_on(tmp_path: Path):
    code = "import sys; sys.executable = '/no/such'; from kvhook.cli import main; "
    code += f"sys.exit(main({RUN[3:]!r} + sys.argv[1:]))"
    with started([sys.executable, "-c", code, RUN[0], "-c", PROGRAM], tmp_path) as running:
        running.send_signal(signal.SIGHUP)
        assert said(running) == "SIGHUP"
        assert ended(running) == 7


def test_the_process_that_stands_by_tells_of_each_signal_once_and_ends():
    witness = Witness()
    pid = witness._pid
    assert not witness.had(signal.SIGTERM)
    for number in (signal.SIGTERM, signal.SIGHUP):
        os.kill(pid, number)
    assert [witness.had(number) for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP)] == [True, False, True]
    os.kill(pid, signal.SIGKILL)
    assert not witness.had(signal.SIGTERM)
    assert not witness.had(signal.SIGTERM)
    witness.end()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_no_other_thread_of_the_command_can_be_given_a_signal(tmp_path: Path):
    """One of numpy's threads was, while the first thread dealt with another signal, and the command ended by it."""
    awaited = sum(1 << number - 1 for number in FORWARDED)
    with started([*RUN, sys.executable, "-c", PROGRAM], tmp_path) as running:
        for thread in Path(f"/proc/{running.pid}/task").iterdir():
            (blocked,) = re.findall("SigBlk:\\s*([0-9a-f]+)", (thread / "status").read_text())
            assert thread.name == str(running.pid) or int(blocked, 16) & awaited == awaited
        assert ended(running) == 7


def test_nothing_is_left_of_a_command_that_was_killed_but_its_program(tmp_path: Path):
    """What stands by ends by itself: it holds the other end of this pipe open for as long as it runs."""
    read, write = os.pipe()
    os.set_inheritable(write, True)
    code = "import os, sys; os.close(int(sys.argv[1])); print('ready', flush=True); sys.stdin.read()"
    command = [*RUN, sys.executable, "-c", code, str(write)]
    running = subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "KVHOOK_DIR": str(tmp_path / "rings")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=[write],
        text=True,
    )
    os.close(write)
    assert said(running) == "ready"
    running.kill()
    assert running.wait(120) == -signal.SIGKILL
    assert os.read(read, 1) == b""
    os.close(read)
    running.communicate("", timeout=120)  # the program goes on until its input ends
