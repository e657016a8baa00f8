"""A share as a bar."""

from __future__ import annotations

import sys

WIDTH = 20


def bar(share: float, width: int = WIDTH, *, ascii_only: bool = False) -> str:
    """A share from 0 to 1 as a bar: ``█████·····``, or ``#####.....``.

    Args:
        share: what is drawn; beyond 0 and 1 the bar is empty or full.
        width: characters.
        ascii_only: draw with ``#``; see `shows_blocks`.
    """
    full, empty = ("#", ".") if ascii_only else ("█", "·")
    filled = round(min(max(share, 0.0), 1.0) * width)
    return full * filled + empty * (width - filled)


def shows_blocks() -> bool:
    """Whether standard output can show the characters of a bar."""
    try:
        "█·".encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
