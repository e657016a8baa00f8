"""Steps as lines of text, one per step, with aligned columns."""

from __future__ import annotations

import time
from typing import Any

from kvhook.text.bar import bar
from kvhook.text.numbers import percent, seconds

Row = dict[str, Any]

#: Name and width of each column; the bar stands in front of the usage.
COLUMNS = (
    ("step", 7),
    ("time", 12),
    ("took", 8),
    ("running", 7),
    ("waiting", 7),
    ("KV usage", 19),
    ("hit rate", 8),
    ("prompt", 7),
    ("gener.", 6),
    ("preempt.", 8),
)
BAR = 10


class StepLines:
    """Formats steps, given in their order, and keeps the sums that the hit rate so far needs.

    Args:
        monotonic_ns: of one moment, by the recording machine's clock,
        realtime_ns: and the same moment since 1970.
        ascii_only: draw the bar with ``#``.
    """

    def __init__(self, monotonic_ns: int, realtime_ns: int, *, ascii_only: bool = False) -> None:
        self._offset_ns = realtime_ns - monotonic_ns
        self._ascii_only = ascii_only
        self._queries = self._hits = 0

    def heading(self) -> str:
        """The line of column names."""
        return "  ".join(f"{name:>{width}}" for name, width in COLUMNS)

    def count(self, row: Row) -> None:
        """Take a step into the sums without a line for it."""
        self._queries += row.get("prefix_cache_queries") or 0
        self._hits += row.get("prefix_cache_hits") or 0

    def line(self, row: Row) -> str:
        """One step. A value that is not known is ``-``."""
        self.count(row)
        start, end = row.get("t_start_ns") or 0, row.get("t_end_ns") or 0
        cells = (
            _number(row.get("step")),
            clock_time(end + self._offset_ns),
            seconds((end - start) / 1e9) if end != start else "-",
            _number(row.get("num_running_reqs")),
            _number(row.get("num_waiting_reqs")),
            self._usage(row.get("kv_cache_usage")),
            percent(self._hits / self._queries if self._queries else None),
            _number(row.get("num_prompt_tokens")),
            _number(row.get("num_generation_tokens")),
            _number(row.get("num_preempted_reqs") or None, none=""),
        )
        return "  ".join(f"{text:>{width}}" for text, (_, width) in zip(cells, COLUMNS, strict=True)).rstrip()

    def _usage(self, share: float | None) -> str:
        if share is None:
            return "-"
        return f"{bar(share, BAR, ascii_only=self._ascii_only)} {percent(share):>8}"


def clock_time(realtime_ns: int) -> str:
    """A time of day with milliseconds, ``-`` for one that cannot be."""
    whole, rest = divmod(realtime_ns, 10**9)
    try:
        return f"{time.strftime('%H:%M:%S', time.localtime(whole))}.{rest // 10**6:03}"
    except (OverflowError, ValueError, OSError):
        return "-"


def _number(value: int | None, none: str = "-") -> str:
    return none if value is None else str(value)
