"""Some engines of a run, as the numbers of a summary are made from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvhook.analysis.totals import Totals


class Part:
    """Some engines of a run together, and which columns their vLLM fills.

    Args:
        totals: of the run.
        engines: the facts of these engines.
        columns: kind of record -> the columns that are live in this run.
    """

    def __init__(self, totals: Totals, engines: Sequence[dict[str, Any]], columns: dict[str, frozenset[str]]) -> None:
        self.engines = engines
        self.columns = columns
        self.steps, self.requests = totals.of({e["engine"] for e in engines})

    def has(self, column: str) -> bool:
        """Whether the steps have this column."""
        return column in self.columns["step"]

    def has_request(self, column: str) -> bool:
        """Whether the finished requests have this column."""
        return column in self.columns["request"]

    def total(self, column: str) -> int | None:
        """The sum of a column of the steps, None if it is not there."""
        return self.steps.sums[column] if self.has(column) else None
