"""What a number of a summary is made of, step by step or request by request, and how sure it is by that."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from kvhook.analysis.resample import FEWEST, Spread, spread_of_quantile, spread_of_ratio
from kvhook.analysis.summarize import account_of, summary_of
from kvhook.analysis.summary import Summary
from kvhook.analysis.totals import Totals
from kvhook.records.columns import Table, has, has_times
from kvhook.records.core import CoreRecords
from kvhook.records.levels import tokens_are_known
from kvhook.records.tables import MAX_LATENCIES, Records
from kvhook.schema import COUNTED, VALUE_SERIES

if TYPE_CHECKING:
    from kvhook.analysis.values import Values

Floats = npt.NDArray[np.float64]

#: Number of a summary -> the columns of the steps whose sums it is the ratio of. "time" are the seconds inside the
#: step, "steps" counts the steps, and "known" those that brought the scheduler's stats.
RATIOS: Mapping[str, tuple[str, str]] = {
    "prefix_cache_hit_rate": ("prefix_cache_hits", "prefix_cache_queries"),
    "kv_cache_usage_mean": ("kv_cache_usage", "known"),
    "num_running_reqs_mean": ("num_running_reqs", "known"),
    "num_waiting_reqs_mean": ("num_waiting_reqs", "known"),
    "prompt_tokens_per_second": ("num_prompt_tokens", "time"),
    "generation_tokens_per_second": ("num_generation_tokens", "time"),
    "num_preempted_reqs": ("num_preempted_reqs", "steps"),
}
#: The columns that these need.
_COLUMNS = sorted({name for pair in RATIOS.values() for name in pair} - {"time", "steps", "known"})
#: Quantile of a summary -> which, and of what.
QUANTILES: Mapping[str, tuple[float, str]] = {
    f"{of}_p{round(100 * share)}": (share, of)
    for of in ("step_time", "time_to_first_token", "inter_token_latency", "e2e_latency")
    for share in (0.5, 0.99)
}
_PREFIXES = dict(zip(VALUE_SERIES, ("ttft", "itl"), strict=True))

TOO_SHORT = f"fewer than {FEWEST} steps have such a number, or they depend on each other so much that few are left"
TOO_FEW = "too few values, or too few beyond this one"


class Measured(NamedTuple):
    """A run in numbers.

    Args:
        summary: the numbers.
        spreads: number -> how sure it is; a text says why that is not known.
    """

    summary: Summary
    spreads: Mapping[str, Spread | str]


def measure(records: Records, cores: CoreRecords | None = None) -> Measured:
    """The summary of a run, and how sure its numbers are.

    Args:
        records: the run.
        cores: what its engine cores recorded.
    """
    totals = Totals()
    with np.errstate(all="ignore"):
        records.go_over(totals.take)
        summary = summary_of(totals, records, None, account_of(cores, records))
        steps = _steps_of(records)
        spreads: dict[str, Spread | str] = {name: _ratio(name, summary, steps) or TOO_SHORT for name in RATIOS}
        if isinstance(spreads["prefix_cache_hit_rate"], str):  # requests come in a few waves: each of them counts
            spreads["prefix_cache_hit_rate"] = _hit_rate_of_requests(records) or TOO_SHORT
        latencies = totals.of().steps.latencies
        for name, (share, of) in QUANTILES.items():
            if of == "step_time":
                took = (steps["t_end_ns"] - steps["t_start_ns"])[has_times(steps)] / 1e9
                found = _of_values(share, took)
            elif of == "e2e_latency":
                found = _of_values(share, _requests_of(records, of))
            else:
                found = _of_latencies(share, of, records, steps, latencies[_PREFIXES[of]])
            spreads[name] = found or TOO_FEW
    return Measured(summary, spreads)


def _steps_of(records: Records) -> Table:
    """The columns of the steps that are wanted here, each engine's steps one after the other."""
    there = {column.name for column in records.columns("step")}
    latencies = [f"{prefix}_{what}" for prefix in _PREFIXES.values() for what in ("count", "min", "max")]
    wanted = ("engine", "step", "t_start_ns", "t_end_ns", "has_scheduler_stats", *_COLUMNS, *latencies)
    steps = records.steps(columns=[name for name in wanted if name in there | {"engine"}])
    return steps[np.argsort(steps["engine"], kind="stable")] if len(records.meta["engines"]) > 1 else steps


def _hit_rate_of_requests(records: Records) -> Spread | None:
    """The same from what each finished request found, where steps are too few."""
    wanted = ("num_cached_tokens", "num_prompt_tokens")
    if not {*wanted} <= {c.name for c in records.columns("request")}:
        return None
    requests = records.requests(columns=wanted)
    requests = requests[(requests["num_cached_tokens"] >= 0) & (requests["num_prompt_tokens"] > 0)]
    found, looked_up = (requests[name].astype(np.float64) for name in wanted)
    return spread_of_ratio(found, looked_up)


def _requests_of(records: Records, column: str) -> Floats:
    """A column of the requests, in the order in which they finished; without those that do not tell it."""
    if column not in {c.name for c in records.columns("request")}:
        return np.empty(0)
    values = records.requests(columns=[column])[column].astype(np.float64)
    known: Floats = values[~np.isnan(values)]
    return known


def _ratio(name: str, summary: Summary, steps: Table) -> Spread | None:
    above, below = RATIOS[name]
    if getattr(summary, name) is None or (above in COUNTED and not tokens_are_known(summary.steps_by_level)):
        return None
    known = steps["has_scheduler_stats"] == 1
    made = {
        "time": np.where(has_times(steps), steps["t_end_ns"] - steps["t_start_ns"], 0) / 1e9,
        "steps": np.ones(len(steps)),
        "known": known.astype(np.float64),
    }
    if any(column not in made and not has(steps, column) for column in (above, below)):
        return None
    top, bottom = (made[c] if c in made else steps[c].astype(np.float64) for c in (above, below))
    if below == "known":
        top = np.where(known, top, 0.0)
    if np.isnan(top).any():
        return None
    return spread_of_ratio(top, bottom)


def _of_values(share: float, values: Floats) -> Spread | None:
    """A quantile of values of which each step or request has one."""
    if len(values) < FEWEST:
        return None
    ordered = np.sort(values)
    below = (values <= np.quantile(ordered, share)).astype(np.float64)
    return spread_of_quantile(share, below, np.ones(len(values)), _quantile_of(ordered))


def _quantile_of(ordered: Floats) -> Callable[[float], float]:
    def quantile(share: float) -> float:
        at = share * (len(ordered) - 1)
        low = math.floor(at)
        high = min(low + 1, len(ordered) - 1)
        return float(ordered[low] + (ordered[high] - ordered[low]) * (at - low))

    return quantile


def _of_latencies(share: float, series: str, records: Records, steps: Table, values: Values) -> Spread | None:
    """A quantile of latencies, of which a step has none, one or many."""
    prefix = _PREFIXES[series]
    if not has(steps, f"{prefix}_count") or not values.count:
        return None

    def quantile(at: float) -> float:
        found = values.nth(at)
        assert found is not None
        return found

    counts = steps[f"{prefix}_count"]
    counts = np.where((counts >= 0) & (counts < MAX_LATENCIES), counts, 0).astype(np.float64)
    return spread_of_quantile(share, up_to(quantile(share), series, records, steps), counts, quantile)


def up_to(bound: float, series: str, records: Records, steps: Table) -> Floats:
    """How many latencies of each step are not above a bound.

    Args:
        bound: in seconds.
        series: which latencies.
        records: the run.
        steps: its steps, each engine's one after the other, with engine, step, and what they say of the latencies.
    """
    prefix = _PREFIXES[series]
    count, low, high = (steps[f"{prefix}_{what}"] for what in ("count", "min", "max"))
    there = (count > 0) & (count < MAX_LATENCIES)
    equal, pair = there & (low == high), (count == 2) & (low != high)
    found = np.where(equal, count * (low <= bound), 0).astype(np.float64)
    found += np.where(pair, (low <= bound).astype(np.int64) + (high <= bound), 0)
    begins = {int(e): int(np.searchsorted(steps["engine"], e)) for e in np.unique(steps["engine"])}
    for engines, numbers, single in records.latency_lists(series):
        for engine in np.unique(engines).tolist():
            if engine not in begins:
                continue
            begin = begins[engine]
            mine = steps["step"][begin : int(np.searchsorted(steps["engine"], engine, side="right"))]
            inside = (engines == engine) & (single <= bound)
            at = np.searchsorted(mine, numbers[inside])
            fits = at < len(mine)
            fits[fits] = mine[at[fits]] == numbers[inside][fits]
            found += np.bincount(begin + at[fits], minlength=len(found))
    return found
