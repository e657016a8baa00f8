"""Where the matrix keeps its environments, logs, results and traces, and how two runs keep out of each other's way."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from setup_words import say

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def cache() -> Path:
    """Where environments, logs, results and traces are kept."""
    named = os.environ.get("KVHOOK_ENGINES")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kvhook" / "engines"


def place(kind: str, name: str) -> Path:
    """A file of one of the kinds logs, results, traces."""
    folder = cache() / kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


def disk_use(folder: Path) -> int:
    """Bytes on the disk; holes in files take none."""
    done = subprocess.run(["du", "-sk", str(folder)], capture_output=True, text=True, check=False)
    return int(done.stdout.split()[0]) * 1024 if done.stdout else 0


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Two runs neither build the same environment nor run the same entry at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as guard:
        try:
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say(f"  another run is at {path.name.removesuffix('.lock')}; waiting for it")
            fcntl.flock(guard, fcntl.LOCK_EX)
        yield
