"""A run as lines over time: one for the steps of each engine, one for the steps of each engine core.

Everything is read in one pass, reduced as it comes; see `kvhook.report.buckets`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvhook.core_schema import LIMITS
from kvhook.records.columns import Table, has
from kvhook.records.core import CoreRecords
from kvhook.records.levels import not_recorded
from kvhook.report.buckets import Buckets, Floats, Reduced, ratio

if TYPE_CHECKING:
    pass

#: Columns of steps that are taken as they are: states (-1 or NaN where they are not known), and counts.
_STATES = ("kv_cache_usage", "kv_cache_usage_peak", "num_running_reqs", "num_waiting_reqs", "kvhook_ns")
_COUNTS = (
    "prefix_cache_queries",
    "prefix_cache_hits",
    "prefix_cache_preempted_queries",
    "prefix_cache_preempted_hits",
    "connector_prefix_cache_queries",
    "connector_prefix_cache_hits",
    "num_prompt_tokens_computed",
    "num_prompt_tokens_cached",
    "num_generation_tokens",
    "num_preempted_reqs",
)
#: Beginning of the names of a latency's columns: count, sum, min, max.
_LATENCIES = ("ttft", "itl")
_STEP_COLUMNS = (
    *_STATES,
    *_COUNTS,
    "step_time",
    *(f"{prefix}_{what}" for prefix in _LATENCIES for what in ("count", "sum", "min", "max")),
)
#: Columns of an engine core's steps: counts, and blocks that become shares of all blocks.
_CORE_COUNTS = (
    "num_prefill_tokens",
    "num_recomputed_tokens",
    "num_decode_tokens",
    "num_spec_tokens",
    "num_found_tokens",
    "num_kv_blocks_evicted",
    "num_preempted_reqs",
)
_CORE_SHARES = {"used": "num_kv_blocks_peak", "cached": "num_kv_blocks_cached", "empty": "num_kv_blocks_empty"}
_CORE_COLUMNS = (*_CORE_COUNTS, *_CORE_SHARES, *(f"limit_{name}" for name in LIMITS), "kvhook_ns")

#: A windowed rate is over at least so many steps, or over this share of the run.
WINDOW, WINDOW_SHARE = 50, 0.02


class Curve(NamedTuple):
    """Values of each bucket. `low` and `high` are None where a bucket is a single step, or where they mean nothing."""

    mean: Floats
    low: Floats | None = None
    high: Floats | None = None


class Line(NamedTuple):
    """The steps of one engine or of one engine core, reduced.

    Args:
        number: of the engine or of the core.
        source: ``"steps"`` or ``"core"``.
        size: steps in each bucket.
        steps: all of them.
        first_step: the number of the first one.
        begin: of each bucket, in seconds of the monotonic clock.
        end: of each bucket.
        curves: name -> values.
    """

    number: int
    source: str
    size: int
    steps: int
    first_step: int
    begin: Floats
    end: Floats
    curves: dict[str, Curve]


class StepLines:
    """Takes in the steps of a run's engines as they come."""

    def __init__(self) -> None:
        self._buckets: dict[int, Buckets] = {}
        self._first: dict[int, int] = {}

    def take(self, engine: int, steps: Table) -> None:
        """Steps of one engine, in order: raw fields, or rows of a table."""
        if not len(steps):
            return
        self._first.setdefault(engine, int(steps["step"][0]))
        buckets = self._buckets.setdefault(engine, Buckets(_STEP_COLUMNS))
        begin, end = steps["t_start_ns"] / 1e9, steps["t_end_ns"] / 1e9
        buckets.take(begin, end, dict(_step_values(steps, end - begin)))

    def lines(self) -> Iterator[Line]:
        """The lines; nothing may be taken in after it."""
        for engine, buckets in sorted(self._buckets.items()):
            reduced = buckets.result()
            curves = dict(_step_curves(reduced))
            yield _line(engine, "steps", reduced, self._first[engine], curves)


def _step_values(steps: Table, took: Floats) -> Iterator[tuple[str, Floats]]:
    unknown = not_recorded(steps)
    stats = steps["has_scheduler_stats"] == 1 if has(steps, "has_scheduler_stats") else np.ones(len(steps), np.bool_)
    for name in (*_STATES, *_COUNTS):
        if has(steps, name):
            values = steps[name].astype(np.float64)
            if name in _STATES:
                values[values < 0] = np.nan
                if name != "kvhook_ns":
                    values[~stats] = np.nan
            if name in unknown:
                values[unknown[name]] = np.nan
            yield name, values
    yield "step_time", np.where(took > 0, took, np.nan)
    for prefix in _LATENCIES:
        if all(has(steps, f"{prefix}_{what}") for what in ("count", "sum", "min", "max")):
            count = steps[f"{prefix}_count"].astype(np.float64)
            nothing = count <= 0
            yield f"{prefix}_count", count
            for what in ("sum", "min", "max"):
                values = steps[f"{prefix}_{what}"].astype(np.float64)
                values[nothing] = np.nan
                yield f"{prefix}_{what}", values


def _step_curves(r: Reduced) -> Iterator[tuple[str, Curve]]:
    for name in (*_STATES, *_COUNTS, "step_time"):
        if r.is_known(name):
            yield name, _curve(r, name)
    for prefix in _LATENCIES:
        if r.is_known(f"{prefix}_sum"):
            mean = ratio(r.total[f"{prefix}_sum"], r.total[f"{prefix}_count"])
            yield prefix, Curve(mean, r.low[f"{prefix}_min"], r.high[f"{prefix}_max"])
    for name, hits, queries in (
        ("hit_rate", "prefix_cache_hits", "prefix_cache_queries"),
        ("preempted_hit_rate", "prefix_cache_preempted_hits", "prefix_cache_preempted_queries"),
        ("connector_hit_rate", "connector_prefix_cache_hits", "connector_prefix_cache_queries"),
    ):
        if r.is_known(queries) and r.total[queries].any():
            yield f"{name}_so_far", Curve(ratio(np.cumsum(r.total[hits]), np.cumsum(r.total[queries])))
            yield f"{name}_window", Curve(_windowed(r, hits, queries))


def window_steps(steps: int) -> int:
    """Over how many steps a windowed rate of a run goes."""
    return max(WINDOW, round(steps * WINDOW_SHARE))


def _windowed(r: Reduced, part: str, whole: str) -> Floats:
    """Of each bucket and those before it, as far as the window goes."""
    many = max(1, round(window_steps(r.steps) / r.size))
    sums = [np.concatenate((np.zeros(1), np.cumsum(r.total[name]))) for name in (part, whole)]
    end = np.arange(1, len(sums[0]))
    begin = np.maximum(end - many, 0)
    return ratio(sums[0][end] - sums[0][begin], sums[1][end] - sums[1][begin])


def _curve(r: Reduced, name: str) -> Curve:
    return Curve(r.mean(name)) if r.size == 1 else Curve(r.mean(name), r.low[name], r.high[name])


def _line(number: int, source: str, r: Reduced, first: int, curves: dict[str, Curve]) -> Line:
    return Line(number, source, r.size, r.steps, first, r.begin, r.end, curves)


def core_lines(cores: CoreRecords) -> Iterator[Line]:
    """The engine cores of a run."""
    for core, facts in enumerate(cores.facts):
        buckets, first = Buckets(_CORE_COLUMNS), None
        for steps in cores.chunks("core_step", core):
            if len(steps):
                first = int(steps["step"][0]) if first is None else first
                begin = steps["t_schedule_ns"] / 1e9
                end = np.maximum.accumulate(np.maximum(steps["t_scheduled_ns"], steps["t_end_ns"])) / 1e9
                buckets.take(begin, end, dict(_core_values(steps, facts)))
        if first is not None:
            r = buckets.result()
            curves = {name: _curve(r, name) for name in _CORE_COLUMNS if r.is_known(name)}
            curves = {name: c for name, c in curves.items() if not name.startswith("limit_") or c.mean.any()}
            yield _line(core, "core", r, first, curves)


def _core_values(steps: Table, facts: dict[str, Any]) -> Iterator[tuple[str, Floats]]:
    for name in (*_CORE_COUNTS, "kvhook_ns"):
        if has(steps, name):
            yield name, _known(steps[name])
    blocks = int(facts.get("num_kv_blocks") or 0)
    for name, column in _CORE_SHARES.items():
        if has(steps, column) and blocks:
            yield name, _known(steps[column]) / blocks
    if has(steps, "limited_by"):
        codes = steps["limited_by"]
        for code, name in enumerate(LIMITS):
            mine = codes == code if name != "unknown" else (codes == code) | (codes < 0) | (codes >= len(LIMITS))
            yield f"limit_{name}", mine.astype(np.float64)


def _known(column: npt.NDArray[np.int64]) -> Floats:
    return np.where(column >= 0, column, np.nan).astype(np.float64)
