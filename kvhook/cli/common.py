"""What verbs share: arguments, and sizes and ages as text."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvhook.trace import Trace


def add_dir(parser: argparse.ArgumentParser) -> None:
    """``--dir``: where the rings are."""
    parser.add_argument(
        "--dir",
        type=file_name,
        metavar="DIR",
        help="look for rings here only (default: KVHOOK_DIR and the usual places)",
    )


def file_name(text: str) -> Path:
    """The name of a file or a folder."""
    try:
        possible = b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise argparse.ArgumentTypeError(f"no file can be called {ascii(text)[:80]}")
    return Path(text)


def open_run(text: str) -> Trace:
    """A run by what a user types: a file, a folder, a pattern, or the number of a process, whose rings are read.

    Raises:
        KvhookError: there is no such thing.
    """
    from kvhook.trace import open_trace

    if not (text.isascii() and text.isdecimal() and len(text) < 11) or Path(text).exists():
        return open_trace(text)
    from kvhook.discovery.rings import ALIVE, choose, find_rings
    from kvhook.ring.directory import directories

    rings = find_rings(directories())
    newest = choose(rings, int(text))
    # several engines that work at the same time, or the one that ended last
    alive = [
        ring.path for ring in reversed(rings) if ring.pid == newest.pid and ring.state == ALIVE and not ring.problem
    ]
    return open_trace(*(alive or [newest.path]))


def positive(text: str) -> int:
    """A number of lines or steps."""
    try:
        number = int(text)
    except ValueError:
        number = -1
    if not 0 <= number <= 1 << 40:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 on")
    return number


def age(seconds: float) -> str:
    """Seconds as people say them: ``12 s``, ``5 min``, ``3.2 h``, ``4 d``."""
    seconds = max(0.0, seconds)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.0f} d"


def size(count: float) -> str:
    """Bytes as people say them."""
    return (
        f"{count / 1e3:.1f} kB" if count < 1e6 else f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"
    )
