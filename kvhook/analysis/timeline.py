"""When each request arrived, was scheduled, had its first token and ended, on the monotonic clock.

An engine core's record has these times. Without one they follow from the step a request ended in and from vLLM's
durations: its last token came at the end of that step, so that times are late by what vLLM's front end takes after it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvhook.records.columns import Table, floats, has

_Floats = npt.NDArray[np.float64]
_NS = 1e9

#: One row per request. Times in seconds, NaN if not known; numbers are -1 if not known.
TYPES = [
    ("engine", "<i8"),
    ("request", "<i8"),
    ("request_id", "<i8"),
    ("finish_reason", "U20"),
    ("arrived", "<f8"),
    ("scheduled", "<f8"),
    ("first_token", "<f8"),
    ("ended", "<f8"),
    ("preempted_time", "<f8"),
    ("num_prompt_tokens", "<i8"),
    ("num_cached_tokens", "<i8"),
    ("num_generation_tokens", "<i8"),
    ("num_preemptions", "<i8"),
    ("first_step", "<i8"),
    ("first_token_step", "<i8"),
    ("last_step", "<i8"),
]
_NUMBERS = ("num_prompt_tokens", "num_cached_tokens", "num_generation_tokens", "num_preemptions")
#: One row per time that a request spent preempted: its row in the timeline, and from when to when.
SPAN_TYPES = [("row", "<i8"), ("begin", "<f8"), ("end", "<f8")]


class Timeline(NamedTuple):
    """Requests in the order of their arrival, and the times that they were preempted.

    Args:
        requests: with the columns of `TYPES`. ``engine`` is the number of the engine core where it is from cores.
        preempted: with the columns of `SPAN_TYPES`; without an engine core's record there are none.
        from_core: whether an engine core recorded them.
    """

    requests: Table
    preempted: Table
    from_core: bool


def timeline(steps: Table, requests: Table) -> Timeline:
    """Of what the front end recorded.

    Args:
        steps: with ``engine``, ``step`` and ``t_end_ns``, in order for each engine.
        requests: as `Records.requests` gives them.
    """
    out = np.zeros(len(requests), TYPES)
    for name in ("engine", "request", "request_id", "finish_reason", *_NUMBERS):
        out[name] = requests[name] if has(requests, name) else -1
    out["last_step"] = requests["step"] if has(requests, "step") else -1
    out["first_step"] = out["first_token_step"] = -1
    out["preempted_time"] = np.nan
    ended = np.full(len(requests), np.nan)
    for engine in np.unique(out["engine"]):
        mine = steps[steps["engine"] == engine]
        rows = (out["engine"] == engine).nonzero()[0]
        if len(mine):
            place = np.minimum(np.searchsorted(mine["step"], out["last_step"][rows]), len(mine) - 1)
            found = mine["step"][place] == out["last_step"][rows]
            ended[rows[found]] = mine["t_end_ns"][place[found]] / _NS
    out["ended"] = ended
    out["arrived"] = ended - _duration(requests, "e2e_latency")
    decode, prefill = _duration(requests, "decode_time"), _duration(requests, "prefill_time")
    out["first_token"] = ended - decode
    out["scheduled"] = ended - decode - prefill
    return Timeline(_sorted(out), np.empty(0, SPAN_TYPES), from_core=False)


def timeline_of_cores(requests: Table, preemptions: Table, lookups: Table) -> Timeline:
    """Of what engine cores recorded, see `kvhook.records.core.CoreRecords`."""
    out = rows_of_cores(requests)
    return Timeline(out, preempted_spans(out, preemptions, lookups), from_core=True)


def rows_of_cores(requests: Table) -> Table:
    """The rows of a timeline of some requests that engine cores recorded."""
    out = np.zeros(len(requests), TYPES)
    out["engine"] = requests["core"]
    for name in ("request", "request_id", "finish_reason", *_NUMBERS):
        out[name] = requests[name] if has(requests, name) else -1
    for name, column in (
        ("arrived", "t_arrived_ns"),
        ("scheduled", "t_first_scheduled_ns"),
        ("first_token", "t_first_token_ns"),
        ("ended", "t_finished_ns"),
    ):
        out[name] = _known(requests[column]) / _NS
    out["preempted_time"] = requests["preempted_ns"] / _NS
    out["first_step"], out["last_step"] = requests["first_scheduled_step"], requests["finished_step"]
    out["first_token_step"] = requests["first_token_step"]
    return _sorted(out)


def preempted_spans(timeline: Table, preemptions: Table, lookups: Table) -> Table:
    """From each preemption to the next time that the request was scheduled again, or to its end."""
    row_of = {(int(r["engine"]), int(r["request"])): i for i, r in enumerate(timeline[["engine", "request"]])}
    resumed: dict[tuple[int, int], list[float]] = {}
    back = lookups[lookups["resumed"] == 1] if len(lookups) else lookups
    for core, request, at in zip(back["core"].tolist(), back["request"].tolist(), back["t_ns"].tolist(), strict=True):
        resumed.setdefault((core, request), []).append(at / _NS)
    found = []
    columns = (preemptions[name].tolist() for name in ("core", "request", "t_ns"))
    for core, request, at in zip(*columns, strict=True):
        row = row_of.get((core, request))
        if row is not None:
            later = [t for t in resumed.get((core, request), ()) if t >= at / _NS]
            found.append((row, at / _NS, min(later, default=float(timeline["ended"][row]))))
    return np.array(found, SPAN_TYPES)


def _sorted(out: Table) -> Table:
    """Without those of which the end is not known, in the order of arrival."""
    out = out[~np.isnan(out["ended"])]
    begin = np.where(np.isnan(out["arrived"]), out["ended"], out["arrived"])
    ordered: Table = out[np.argsort(begin, kind="stable")]
    return ordered


def _duration(requests: Table, name: str) -> _Floats:
    """A column of seconds; NaN where vLLM does not tell."""
    values = floats(requests, name) if has(requests, name) else np.full(len(requests), np.nan)
    return np.where(values >= 0, values, np.nan)


def _known(nanoseconds: npt.NDArray[np.int64]) -> _Floats:
    return np.where(nanoseconds >= 0, nanoseconds.astype(np.float64), np.nan)
