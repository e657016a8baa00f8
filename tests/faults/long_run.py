"""What the long runs share: what is measured of the process, how long they run, and how they tell what came of it."""

from __future__ import annotations

import ctypes
import gc
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol


class Result(Protocol):
    """What came of a run: a named tuple that knows what is wrong with it."""

    def complaints(self) -> list[str]: ...
    def _asdict(self) -> dict[str, Any]: ...


def run(play: Callable[[float, Path], Result], short: float) -> int:
    """Plays for KVHOOK_SOAK_SECONDS, or for `short` seconds, in a folder of its own, and prints what came of it.

    Gives 1 if something is wrong.
    """
    seconds = float(os.environ.get("KVHOOK_SOAK_SECONDS") or short)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["KVHOOK_DIR"] = f"{folder}/rings"
        found = play(seconds, Path(folder))
    for name, value in found._asdict().items():
        print(f"{name:12} {value:,.0f}" if isinstance(value, (int, float)) else f"{name:12} {value}")
    for complaint in found.complaints():
        print(f"WRONG: {complaint}")
    return 1 if found.complaints() else 0


def memory_kb() -> int:
    """Resident memory of this process, without files that are mapped."""
    fields = Path("/proc/self/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE") // 1024


def settled_kb() -> int:
    """The same, without what is garbage, and without what the C library keeps of memory that was given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return memory_kb()


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def descriptors() -> int:
    """Open files but the traces', of which there are more and more until the history is full."""
    return len([fd for fd in map(int, os.listdir("/proc/self/fd")) if not is_trace(fd)])


def is_trace(fd: int) -> bool:
    """Whether an open file is a trace."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}").endswith(".kvh")
    except OSError:
        return False
