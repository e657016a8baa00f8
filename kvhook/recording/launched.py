"""Under ``kvhook run``: to which command a process belongs, and how that learns what the process records into.

The command makes an empty file, its list, and hands the path down in ``KVHOOK_RUN``: whatever is forked, spawned,
exec'ed or left behind as a daemon has it. Commands in each other hand down all their lists, the outermost first. The
name of a list has a random mark in it, which goes into the header of every ring and trace. And each process appends the
names of its traces to the lists, since a program may record into other files than it was asked to.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

from kvhook.discovery.cleaning import name_of_mark
from kvhook.recording.from_environment import ENV_RUN
from kvhook.ring.layout import Header
from kvhook.ring.place import create_file, history_root, open_regular

#: The fact that holds the marks.
RUNS = "kvhook_runs"
_MARK = re.compile(rf"-run([0-9a-f]{{16}})-\d+(?={os.pathsep}|$)")
#: No more is read of a list.
_MOST_READ = 8 << 20


def facts_of_runs(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The fact of the commands that a process runs under; none if there is none."""
    marks = _MARK.findall(environment.get(ENV_RUN, ""))
    return {RUNS: ",".join(marks)} if marks else {}


def tell_runs(trace: Path, environment: Mapping[str, str] = os.environ) -> None:
    """Tell the commands that this process is about to record into a file. One that has ended does not learn of it."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    for path in environment.get(ENV_RUN, "").split(os.pathsep):
        if _MARK.search(path):
            with contextlib.suppress(OSError), open(os.open(path, flags), "wb", buffering=0) as file:
                if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    file.write(json.dumps(str(trace)).encode() + b"\n")


class LaunchedRun:
    """A command of its own: its mark, and its list while it runs."""

    def __init__(self) -> None:
        self.mark = secrets.token_hex(8)
        # named like what marks a session, so that `kvhook clean` finds that of a command that was killed
        self._list = history_root() / name_of_mark(os.getpid(), f"run{self.mark}")
        with contextlib.suppress(OSError):  # without it, traces that lie elsewhere are not found
            os.close(create_file(self._list))

    def handed_down(self, environment: Mapping[str, str] = os.environ) -> str:
        """What `ENV_RUN` is for its program."""
        outer = environment.get(ENV_RUN, "")
        return f"{outer}{os.pathsep}{self._list}" if _MARK.search(outer) else str(self._list)

    def owns(self, header: Header) -> bool:
        """Whether a ring or a trace was made by its program, or by what that has started."""
        told = header.meta.get(RUNS)
        return isinstance(told, str) and self.mark in told.split(",")

    def told(self) -> list[Path]:
        """The names of traces that processes wanted to record into. A name may have been taken by somebody else."""
        with contextlib.suppress(OSError), open(open_regular(self._list, follow_links=False), "rb") as file:
            return [path for line in file.read(_MOST_READ).splitlines() if (path := _path(line)) is not None]
        return []

    def end(self) -> None:
        """Remove the list."""
        with contextlib.suppress(OSError):
            self._list.unlink()


def _path(line: bytes) -> Path | None:
    with contextlib.suppress(ValueError, RecursionError):
        text = json.loads(line)
        if isinstance(text, str) and "\0" not in text and os.path.isabs(text):
            return Path(text)
    return None
