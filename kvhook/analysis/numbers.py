"""The numbers of a summary by name, as conditions ask for them: ``prefix_cache_hit_rate``, ``itl_p99``."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping

from kvhook.analysis.core_report import CoreReport
from kvhook.analysis.distribution import Distribution
from kvhook.analysis.summary import Summary

#: Short names of the times -> their names in a summary.
SHORT = {
    "ttft": "time_to_first_token",
    "itl": "inter_token_latency",
    "tpot": "mean_time_per_output_token",
    "e2e": "e2e_latency",
}
_TIMES = ("step_time", *SHORT.values())
_PARTS = tuple(f.name for f in dataclasses.fields(Distribution))

#: What an engine core's account adds, with ``core_`` before it.
_CORE = tuple(
    f.name for f in dataclasses.fields(CoreReport) if f.type in ("int", "float", "float | None", "int | None")
)

#: Every name that there is, in the order of the summary.
NAMES: tuple[str, ...] = (
    *(f.name for f in dataclasses.fields(Summary) if f.type in ("int", "float", "int | None", "float | None")),
    *(f"{name}_{part}" for name in _TIMES for part in _PARTS),
    *(f"core_{name}" for name in _CORE),
)


def full_name(name: str) -> str:
    """A name with a short one for a time spelt out: ``itl_p99`` is ``inter_token_latency_p99``."""
    short, _, part = name.partition("_")
    return f"{SHORT[short]}_{part}" if short in SHORT and part in _PARTS else name


def unknown_name(name: str) -> str:
    """What to say to a name that there is not: those near it."""
    known = (*NAMES, *(f"{short}_{part}" for short in SHORT for part in _PARTS))
    near = difflib.get_close_matches(name, known, 4)
    more = f"; near it are {', '.join(near)}" if near else ""
    return f"there is no number {name!r}{more}; the numbers are those of kvhook summary --json"


def numbers_of(summary: Summary) -> Mapping[str, float | None]:
    """Every name and its value; None for what is not known."""
    found: dict[str, float | None] = {}
    for name in NAMES:
        value: object = None
        if name.startswith("core_"):
            value = getattr(summary.core, name.removeprefix("core_")) if summary.core is not None else None
        elif hasattr(summary, name):
            value = getattr(summary, name)
        else:
            time, _, part = name.rpartition("_")
            value = getattr(getattr(summary, time), part)
        known = isinstance(value, (int, float)) and math.isfinite(value)
        found[name] = float(value) if known and isinstance(value, (int, float)) else None
    return found


def why_unknown(summary: Summary, name: str) -> str:
    """Why a number of a summary is not known."""
    if name.startswith("core_"):
        return "nothing was recorded inside the engine core"
    if name.startswith("prefix_cache") and summary.prefix_caching is False:
        return "prefix caching was off"
    base = next((n for n in (name, name.rpartition("_")[0]) if n in summary.not_recorded or n in summary.absent), "")
    return summary.not_recorded.get(base) or summary.absent.get(base) or "this run has no such values"
