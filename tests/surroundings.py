"""The tests that need no engine, in surroundings as people have them: each must pass as it does anywhere else.

    python tests/surroundings.py                          all of them
    python tests/surroundings.py background read-only     these only
    python tests/surroundings.py --list                   what there is, and what cannot be had here
    python tests/surroundings.py --pytest '-k tail'       arguments for pytest
    python tests/surroundings.py --table FILE.md          write the table of results into that file

Or `make surroundings`. Of what is unusual in a surrounding the tests are told nothing: what a test needs, it sets up
itself. What pytest printed is kept in a folder that is named at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import errno
import fcntl
import os
import platform
import pty
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
#: What one run of the tests may take, in seconds.
TIMEOUT_S = 30 * 60

ROOT_IS_US = os.geteuid() == 0
#: A mount table of our own: root may have one, others as the root of a user namespace.
_MOUNTS = ("unshare", "--mount") if ROOT_IS_US else ("unshare", "--user", "--map-root-user", "--mount")
_PLANT = """
mount -t tmpfs -o size=64m,mode=1777 none /dev/shm || exit 99
planted=/dev/shm/kvhook-$(id -u)
# somebody else's directory; without the right to give one away, a link to another place
mkdir $planted && chown 12345 $planted 2>/dev/null || { rmdir $planted; ln -s /tmp $planted; }
exec "$@"
"""
_READ_ONLY = """
here=$PWD
mount --bind "$here" "$here" && mount -o remount,bind,ro "$here" && cd "$here" || exit 99
touch tests/written 2>/dev/null && exit 99
exec "$@"
"""


def shell(script: str) -> tuple[str, ...]:
    """A command that runs the command behind it as a shell script says, where it is ``"$@"``."""
    return ("sh", "-c", script, "sh")


class Surroundings(NamedTuple):
    """Where the tests are run.

    Attributes:
        name: for the command line.
        what: for the table.
        under: the command that runs pytest.
        variables: of the environment, as a shell has them.
        without: variables that are taken away.
        keep: take away all variables but these.
        folder: `TMPDIR` is a folder of this name.
        terminal: columns and lines of the terminal that it has; there is none otherwise.
    """

    name: str
    what: str
    under: tuple[str, ...] = ()
    variables: str = ""
    without: str = ""
    keep: str = ""
    folder: str = ""
    terminal: tuple[int, int] | None = None


ALL = (
    Surroundings(
        "background",
        "started with `&` by a shell script: SIGINT and SIGQUIT are ignored",
        shell('"$@" & wait $!'),
    ),
    Surroundings(
        "cron",
        "no variable but PATH, no standard input, SIGHUP ignored, umask 077",
        shell("trap '' HUP; umask 077; exec \"$@\" <&-"),
        keep="PATH PYTHONPATH",
    ),
    Surroundings(
        "terminal",
        "a terminal of 20 columns and an unknown kind, colours forced; LANG=tr_TR.UTF-8",
        variables="TERM=no-such-terminal COLUMNS=20 LINES=3 FORCE_COLOR=1 CLICOLOR_FORCE=1 LANG=tr_TR.UTF-8",
        without="LC_ALL NO_COLOR",
        terminal=(20, 3),
    ),
    Surroundings(
        "ascii",
        "LC_ALL=POSIX, and Python does not make UTF-8 of it; TZ=Asia/Kathmandu; COLUMNS=0, TERM=dumb",
        variables="LC_ALL=POSIX PYTHONCOERCECLOCALE=0 PYTHONUTF8=0 TZ=Asia/Kathmandu COLUMNS=0 TERM=dumb",
        without="PYTHONIOENCODING",
    ),
    Surroundings(
        "spaces",
        "TMPDIR with spaces, quotes and letters that are not ASCII; umask 000; HOME does not exist",
        shell('umask 000; exec "$@"'),
        variables="HOME=/nonexistent/home XDG_RUNTIME_DIR=/nonexistent/run",
        without="XDG_CACHE_HOME",
        folder="größer als 'ein \"Ordner\"' 日本",
    ),
    Surroundings(
        "read-only",
        "the checkout is mounted read-only; HOME cannot be written; PYTHONDONTWRITEBYTECODE=1",
        (*_MOUNTS, *shell(_READ_ONLY)),
        variables="HOME=/proc PYTHONDONTWRITEBYTECODE=1",
        without="XDG_CACHE_HOME",
    ),
    Surroundings(
        "planted",
        "/dev/shm holds 64 MiB, and its kvhook-$UID is somebody else's",
        (*_MOUNTS, *shell(_PLANT)),
    ),
    Surroundings(
        "variables",
        "KVHOOK_*, VLLM_* and PYTHON* set by the user",
        variables="KVHOOK_DIR=/proc/kvhook KVHOOK_TRACE=/proc/run.kvh KVHOOK_LEVEL=nonsense KVHOOK_KILLS=0 "
        "VLLM_USE_V1=1 VLLM_LOGGING_LEVEL=DEBUG VLLM_CONFIGURE_LOGGING=0 "
        "PYTHONSAFEPATH=1 PYTHONHASHSEED=7 PYTHONWARNINGS=default PYTHONUNBUFFERED=1 PYTHONDEVMODE=1",
    ),
    Surroundings(
        "other-user",
        "as a user who is not root" if ROOT_IS_US else "as root, who may do everything",
        ("unshare", "--user", *(("--map-user=1000", "--map-group=1000") if ROOT_IS_US else ("--map-root-user",))),
    ),
)


class Outcome(NamedTuple):
    """How the tests went in one of them. ``note``: what failed, or why it could not be had."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    note: str = ""

    @property
    def verdict(self) -> str:
        return "FAILED" if self.failed else "passed" if self.passed else "cannot be had here"


def why_not(one: Surroundings) -> str:
    """Why a surrounding cannot be had here; "" if it can."""
    if not one.under or one.under[0] == "sh":
        return ""
    if shutil.which(one.under[0]) is None:
        return f"there is no {one.under[0]}"
    done = subprocess.run([*one.under, "true"], cwd=ROOT, capture_output=True, text=True, check=False)
    return (done.stderr.strip() or f"exit code {done.returncode}") if done.returncode else ""


def environment(one: Surroundings, temporary: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not one.keep or name in one.keep.split()}
    for name in one.without.split():
        kept.pop(name, None)
    kept |= dict(variable.split("=", 1) for variable in shlex.split(one.variables))
    if one.folder:
        (temporary / one.folder).mkdir(parents=True)
        kept["TMPDIR"] = str(temporary / one.folder)
    return kept


def run(one: Surroundings, more: list[str], folder: Path) -> Outcome:
    """The tests in one of them."""
    if reason := why_not(one):
        return Outcome(note=reason)
    began = time.monotonic()
    report, log = folder / f"{one.name}.xml", folder / f"{one.name}.txt"
    command = [*one.under, sys.executable, "-m", "pytest", "-m", "not engine", f"--junitxml={report}", *more]
    with log.open("wb") as out, tempfile.TemporaryDirectory(prefix="kvhook-surroundings-") as temporary:
        out.write(f"$ {shlex.join(command)}\n".encode())
        out.flush()
        code = call(command, environment(one, Path(temporary)), out.fileno(), one.terminal)
    return read_report(report, code)._replace(seconds=time.monotonic() - began)


def call(command: list[str], variables: dict[str, str], out: int, size: tuple[int, int] | None) -> int:
    """Run a command in a session of its own, of which nothing is left afterwards; gives its exit code."""
    ours = theirs = -1
    if size is not None:
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))
        threading.Thread(target=copy, args=(ours, out), daemon=True).start()
    process = subprocess.Popen(
        command,
        env=variables,
        cwd=ROOT,
        stdin=theirs if size else subprocess.DEVNULL,
        stdout=theirs if size else out,
        stderr=theirs if size else out,
        start_new_session=True,
    )
    if size:
        os.close(theirs)
    try:
        return process.wait(TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return 124
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()


def copy(terminal: int, out: int) -> None:
    """What is written to a terminal, until nobody has it open any more."""
    while True:
        try:
            data = os.read(terminal, 65536)
        except OSError as error:
            if error.errno == errno.EIO:
                return
            raise
        if not data:
            return
        with contextlib.suppress(OSError):  # the log is closed: whoever still writes has outlived the run
            os.write(out, data)


def read_report(path: Path, code: int) -> Outcome:
    """What pytest's JUnit file says."""
    try:
        cases = list(ElementTree.parse(path).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return Outcome(failed=1, note=f"pytest made no report (exit code {code})")
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    note = ", ".join(str(case.get("name")) for case in bad) or (f"exit code {code}" if code else "")
    return Outcome(len(cases) - len(bad) - skipped, max(len(bad), int(code != 0)), skipped, note=note)


HEADINGS = ["surroundings", "what is unusual", "result", "passed", "failed", "skipped", "seconds", "remarks"]


def row(one: Surroundings, found: Outcome) -> list[str]:
    ran = found.passed or found.failed
    counts = [str(n) for n in (found.passed, found.failed, found.skipped, round(found.seconds))] if ran else [""] * 4
    return [one.name, one.what, found.verdict, *counts, found.note]


def markdown(rows: list[list[str]]) -> str:
    head = f"{datetime.date.today()}, Python {platform.python_version()}, {os.cpu_count()} cores, user {os.geteuid()}"
    lines = ["| " + " | ".join(cells) + " |" for cells in (HEADINGS, *rows)]
    lines.insert(1, "|---" * len(HEADINGS) + "|")
    return "\n".join([head, "", *lines]) + "\n"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="surroundings to run in; all if none is named")
    parser.add_argument("--list", action="store_true", help="show what there is, and end")
    parser.add_argument("--pytest", metavar="ARGUMENTS", default="-q", help="handed on to pytest")
    parser.add_argument("--table", metavar="FILE", type=Path, help="write the table into FILE")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - {one.name for one in ALL}:
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(one.name for one in ALL)}")
    return options


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    chosen = [one for one in ALL if not options.names or one.name in options.names]
    if options.list:
        for one in chosen:
            reason = why_not(one)
            print(f"{one.name:<12}{one.what}" + (f" (cannot be had here: {reason})" if reason else ""))
        return 0
    folder = Path(tempfile.mkdtemp(prefix="kvhook-surroundings-"))
    rows, failed = [], 0
    for one in chosen:
        print(f"{one.name}: {one.what}", flush=True)
        found = run(one, shlex.split(options.pytest), folder)
        rows.append(row(one, found))
        failed += bool(found.failed)
        counts = f"{found.passed} passed, {found.failed} failed, {found.skipped} skipped, {found.seconds:.0f} s"
        print(f"    {found.verdict}: {counts}" + (f"; {found.note}" if found.note else ""), flush=True)
    if options.table:
        options.table.write_text(markdown(rows), encoding="utf-8")
    print(f"\n{markdown(rows)}\nWhat pytest printed is in {folder}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
