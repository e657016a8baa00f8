"""How a run went over time, whatever it was read from: rows of states and running totals, and the parts of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvhook.records.columns import Table, has
from kvhook.records.levels import not_counted
from kvhook.schema import COUNTED

#: What is so at the moment of a row. NaN where it is not known.
STATES = ("kv_cache_usage", "num_running_reqs", "num_waiting_reqs", "v0_prefix_cache_hit_rate")
#: What has been counted up to a row, since counting began. NaN where it is not known.
TOTALS = (
    "prefix_cache_queries",
    "prefix_cache_hits",
    "num_prompt_tokens",
    "num_generation_tokens",
    "num_preempted_reqs",
    "num_finished_reqs",
)
#: ``t`` is monotonic, to compare with; ``timestamp`` is Unix time, to show. Both in seconds.
COLUMNS = ("t", "timestamp", *STATES, *TOTALS)

#: Columns of the steps that a history is made from; of those that are not always there, what there is.
NEEDED = ("t_end_ns", "has_scheduler_stats", "has_iteration_stats", "level", *STATES, *TOTALS)

History = npt.NDArray[np.void]

_TYPE = np.dtype([(name, "<f8") for name in COLUMNS])


def from_steps(steps: Table, unix_offset: float) -> History:
    """One row per engine step: the states after it, and the totals up to it.

    Args:
        steps: what `kvhook.Trace.steps` gives. Of several engines, the states of a row are those of its engine and
            the totals those of all.
        unix_offset: what to add to the monotonic clock for Unix time, in seconds.
    """
    steps = steps[np.argsort(steps["t_end_ns"], kind="stable")]
    known = steps["has_scheduler_stats"] == 1
    out = np.full(len(steps), np.nan, _TYPE)
    out["t"] = steps["t_end_ns"] / 1e9
    out["timestamp"] = out["t"] + unix_offset
    for name in STATES:
        if has(steps, name):
            out[name] = np.where(known, steps[name], np.nan)
    # from the first step that was not counted on, totals are not known any more
    unknown = np.logical_or.accumulate(not_counted(steps))
    for name in TOTALS:
        if has(steps, name):
            out[name] = np.cumsum(steps[name])
            if name in COUNTED:
                out[name][unknown] = np.nan
    return out


def from_samples(samples: Sequence[tuple[float, dict[str, float]]], unix_offset: float) -> History:
    """One row per sample: a monotonic time in seconds, and the values that were known then."""
    out = np.full(len(samples), np.nan, _TYPE)
    for row, (t, values) in zip(out, samples, strict=True):
        row["t"], row["timestamp"] = t, t + unix_offset
        for name in (*STATES, *TOTALS):
            if name in values:
                row[name] = values[name]
    return out


def count_or_share(name: str, value: float) -> float:
    """A value of a column: counts of requests and tokens as int, shares as float."""
    return int(value) if name.startswith(("num_", "prefix_")) else float(value)


def cut(history: History, edges: Sequence[float]) -> list[dict[str, Any]]:
    """What happened between each edge and the next, as plain values; None where it is not known.

    Rows with ``edge < t <= next`` belong to a part: its counts are the differences of the totals, its peaks those of
    its rows. ``*_so_far`` is the hit rate from the first edge on.

    Args:
        edges: monotonic times in ascending order; -inf is fine. Totals begin at 0 before the first row.
    """
    index = np.searchsorted(history["t"], edges, side="right") if len(edges) else np.zeros(0, np.int64)
    parts = []
    for begin, end in itertools.pairwise(index):
        rows = history[begin:end]
        counts = {name: _difference(history[name], begin, end) for name in TOTALS}
        part: dict[str, Any] = {
            "begin": float(history["timestamp"][begin - 1]) if begin else None,
            "end": float(history["timestamp"][end - 1]) if end else None,
            "rows": len(rows),
            "kv_cache_usage": _last(rows["kv_cache_usage"]),
            "kv_cache_usage_peak": _peak(rows["kv_cache_usage"]),
            "kv_cache_usage_mean": _mean(rows["kv_cache_usage"]),
            "num_running_reqs_peak": _whole(_peak(rows["num_running_reqs"])),
            "num_waiting_reqs_peak": _whole(_peak(rows["num_waiting_reqs"])),
            **counts,
            "prefix_cache_hit_rate": _rate(counts["prefix_cache_hits"], counts["prefix_cache_queries"]),
            "prefix_cache_hit_rate_so_far": _rate(
                *(_difference(history[n], index[0], end) for n in ("prefix_cache_hits", "prefix_cache_queries"))
            ),
        }
        parts.append(part)
    return parts


def even_edges(history: History, begin: float, end: float, parts: int) -> list[float]:
    """Edges that cut the rows between two times into at most `parts` parts of equally many rows."""
    t = history["t"][(history["t"] > begin) & (history["t"] <= end)]
    if not len(t):
        return []
    last_of_part = [int(rows[-1]) for rows in np.array_split(np.arange(len(t)), min(parts, len(t)))]
    return [begin, *t[last_of_part].tolist()]


class Monitored(NamedTuple):
    """The rows of a monitored time, and the hit rate at each of them: a share, of all that was looked up in the
    monitored times so far; NaN before the first look-up, and where it is not known."""

    rows: History
    hit_rate: npt.NDArray[np.float64]


def monitored(history: History, periods: Iterable[Sequence[float]]) -> list[Monitored]:
    """The monitored times of a history.

    Args:
        periods: begin and end of each, monotonic, one after the other; -inf and inf are fine.
    """
    parts = []
    so_far = {"prefix_cache_queries": 0.0, "prefix_cache_hits": 0.0}
    for begin, end in periods:
        rows = history[(history["t"] >= begin) & (history["t"] <= end)]
        # as in `cut`: what is counted at the very beginning came before it
        before = int(np.searchsorted(history["t"], begin, side="right"))
        counts = {}
        for name, count in so_far.items():
            counts[name] = count + rows[name] - (history[name][before - 1] if before else 0.0)
            so_far[name] = float(counts[name][-1]) if len(rows) else count
        queries, hits = counts.values()
        known = (queries > 0) & (hits >= 0)
        parts.append(Monitored(rows, np.divide(hits, queries, out=np.full(len(rows), np.nan), where=known)))
    return parts


def _difference(totals: npt.NDArray[np.float64], begin: int, end: int) -> int | None:
    if not len(totals):
        return None
    after = totals[end - 1] if end else 0.0
    before = totals[begin - 1] if begin else 0.0
    difference = float(after - before)
    # fewer than before: another engine counts now
    return int(difference) if difference >= 0 else None


def _rate(hits: int | None, queries: int | None) -> float | None:
    return hits / queries if hits is not None and queries else None


def _peak(values: npt.NDArray[np.float64]) -> float | None:
    return float(np.nanmax(values)) if (values == values).any() else None


def _mean(values: npt.NDArray[np.float64]) -> float | None:
    return float(np.nanmean(values)) if (values == values).any() else None


def _last(values: npt.NDArray[np.float64]) -> float | None:
    known = values[values == values]
    return float(known[-1]) if len(known) else None


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
