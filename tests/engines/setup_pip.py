"""Runs pip for `.venv`: in an environment that lets it install there only, with hashes, and with its words kept.

Only the standard library and the syntax of Python 3.7, as in setup_env.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading

from hashes import mismatch_message, mismatches, with_hashes
from setup_packages import lacking
from setup_stamp import ROOT
from setup_words import Progress, SetupError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import IO


def clean_environment() -> dict[str, str]:
    """The environment for pip: with the user's indexes and proxies, without what would install elsewhere."""
    drop = {"PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE", "__PYVENV_LAUNCHER__"}
    drop |= {"PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_CONSTRAINT", "PIP_REQUIREMENT", "PIP_DRY_RUN"}
    # With PIP_REQUIRE_HASHES pip would refuse kvhook itself, which is a folder.
    drop |= {"PIP_QUIET", "PIP_VERBOSE", "PIP_NO_BINARY", "PIP_REQUIRE_HASHES"}
    drop |= {"PIP_REQUIRE_VIRTUALENV"}  # it would refuse `pip --python`
    env = {name: value for name, value in os.environ.items() if name not in drop}
    env["PIP_USER"] = "0"
    env["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    env["PIP_NO_INPUT"] = "1"
    return env


class Pip:
    """Runs pip for one environment, shows how far it is, and keeps all it says in a log file."""

    def __init__(self, venv: str, lock_fd: int) -> None:
        self.venv = venv
        self.lock_fd = lock_fd
        self.log = os.path.join(venv, ".kvhook-setup.log")

    def install_checked(self, label: str, pins: dict[str, str]) -> tuple[bool, str]:
        """Install pins whose files have the hashes that are known of them; else a SetupError says what is wrong."""
        wishes = os.path.join(self.venv, ".kvhook-wanted.txt")
        write_wishes(wishes, pins)
        worked, output = self(label, ["--no-deps", "--only-binary=:all:", "--require-hashes", "-r", wishes], pins)
        os.remove(wishes)
        if not worked:
            told = mismatches(output)
            if told:
                raise SetupError(mismatch_message(told))
        return worked, output

    def __call__(self, label: str, arguments: list[str], pins: dict[str, str]) -> tuple[bool, str]:
        """Run `pip install`; returns whether it worked and what it printed."""
        python = os.path.join(self.venv, "bin", "python")
        command = [python, "-m", "pip", "install", "--progress-bar", "off", "--no-warn-script-location", *arguments]
        progress = Progress(label)
        said: list[str] = []
        code = self.run(command, said, lambda: progress.show(how_far(said, pins, self.venv)))
        if code < 0:
            said.append("pip was ended by signal {}.\n".format(-code))
        if code == 0:
            progress.done("{} package{} installed".format(len(pins), "" if len(pins) == 1 else "s"))
        elif progress.live:
            sys.stdout.write("\r\033[K")
        return code == 0, "".join(said)

    def run(self, command: list[str], said: list[str], meanwhile: Callable[[], None]) -> int:
        """Run a command to its end and put its lines into `said`; `meanwhile` is called twice a second."""
        # The set-up's lock goes along: should this script be killed, the next run waits until pip has ended.
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=clean_environment(),
            pass_fds=(self.lock_fd,),
            cwd=ROOT,
        )
        ear = threading.Thread(target=self.listen, args=(command, child.stdout, said), daemon=True)
        ear.start()
        try:
            while True:
                try:
                    child.wait(timeout=0.5)
                    break
                except subprocess.TimeoutExpired:
                    meanwhile()
        except BaseException:
            child.terminate()
            child.wait()
            raise
        ear.join(10)
        return child.returncode

    def listen(self, command: list[str], stream: IO[bytes], said: list[str]) -> None:
        """Keep what a command prints, in the log and in `said`."""
        with open(self.log, "a", encoding="utf-8") as log:
            log.write("\n$ " + " ".join(command) + "\n")
            for raw in stream:
                line = raw.decode("utf-8", "replace")
                said.append(line)
                log.write(line)
                log.flush()


def write_wishes(path: str, pins: dict[str, str]) -> None:
    """A requirements file with the hash of everything in it."""
    try:
        lines = with_hashes("{}=={}".format(name, version) for name, version in pins.items())
    except (OSError, ValueError) as error:
        raise SetupError(str(error)) from error
    with open(path, "w", encoding="utf-8") as f:
        f.writelines(line + "\n" for line in lines)


def how_far(said: list[str], pins: dict[str, str], venv: str) -> str:
    """What pip is doing, from what it has printed so far."""
    fetched = 0
    current = ""
    for line in list(said):
        found = re.match(r"Collecting (\S+)", line)
        if found:
            fetched += 1
            current = found.group(1)
        if line.startswith("Installing collected packages"):
            total = len(pins)
            return "unpacking, {} of {} packages".format(total - len(lacking(venv, pins)), total)
    if not fetched:
        return "starting"
    return "fetching {} of {}, {}".format(fetched, max(fetched, len(pins)), current)


# Lines of pip's that say nothing about why it failed.
CHATTER = (
    "Collecting ",
    "Processing ",
    "Downloading ",
    "Using cached ",
    "Requirement already ",
    "Looking in ",
    "Installing collected ",
    "WARNING: Location ",
    "[notice]",
)


def pip_failure(what: str, output: str, log: str) -> SetupError:
    """An error that shows the end of what pip said, and what may help."""
    lines = [line.rstrip() for line in output.splitlines() if line.strip()]
    telling = [line for line in lines if not line.lstrip().startswith(CHATTER)]
    tail = [line[:240] for line in (telling or lines)[-8:]]
    text = ["Could not install {}. pip said:".format(what), *("    " + line for line in tail)]
    text.append("The whole of it is in {}.".format(os.path.relpath(log, ROOT)))
    if "No space left" in output:
        text.append("The disk is full; TMPDIR names another folder for the files on their way.")
    text.append("What is already installed stays: run the same make command again to go on.")
    return SetupError("\n".join(text))
