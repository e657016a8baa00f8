"""Columns that may not be there: a vLLM that cannot fill a column has none of that name in its tables."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Table = npt.NDArray[np.void]


def has(table: Table, name: str) -> bool:
    """Whether a table has this column."""
    return name in (table.dtype.names or ())


def floats(table: Table, name: str) -> npt.NDArray[np.float64]:
    """A column as floats, empty if it is not there."""
    return table[name].astype(np.float64) if has(table, name) else np.empty(0)


def texts(table: Table, name: str) -> npt.NDArray[np.str_]:
    """A column of text, empty if it is not there."""
    return table[name] if has(table, name) else np.empty(0, "U1")


def total(table: Table, name: str) -> int | None:
    """The sum of a column, None if it is not there."""
    return int(table[name].sum()) if has(table, name) else None


def has_times(steps: Table) -> npt.NDArray[np.bool_]:
    """Which steps have a start and an end. A record without them has one time twice: that of its stats."""
    timed: npt.NDArray[np.bool_] = steps["t_end_ns"] != steps["t_start_ns"]
    return timed


def step_seconds(steps: Table) -> npt.NDArray[np.float64]:
    """How long the steps took, in seconds, without those that have no times."""
    took: npt.NDArray[np.float64] = (steps["t_end_ns"] - steps["t_start_ns"])[has_times(steps)] / 1e9
    return took


def with_stats(steps: Table) -> Table:
    """The steps that brought the scheduler's stats: only in these are states (gauges) known."""
    known: Table = steps[steps["has_scheduler_stats"] == 1]
    return known
