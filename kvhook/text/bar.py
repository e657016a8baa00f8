"""A share as a bar, and values as a row of bars."""

from __future__ import annotations

import sys
from collections.abc import Iterable

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


def sparkline(values: Iterable[float], top: float, *, ascii_only: bool = False) -> str:
    """Values as a row of bars from 0 to `top`: ``▁▃▅█``; a blank for NaN.

    Args:
        values: what is drawn; beyond 0 and `top` a bar is lowest or highest.
        top: what the highest bar stands for.
        ascii_only: draw with ASCII alone; see `shows_blocks`.
    """
    levels = "_.:-=+*#" if ascii_only else "▁▂▃▄▅▆▇█"
    last = len(levels) - 1
    return "".join(
        " " if v != v else levels[round(min(max(v / top if top > 0 else 0.0, 0.0), 1.0) * last)] for v in values
    )


def shows_blocks() -> bool:
    """Whether standard output can show the characters of a bar."""
    try:
        "█·▁▂▃".encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
