"""What engines do, as Prometheus's text format: what vLLM's own ``/metrics`` does not have."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from kvhook.analysis.live import View

Values = list[tuple[dict[str, str], float]]


def _one(value: float | int | None) -> Values:
    return [] if value is None or math.isnan(value) else [({}, float(value))]


def _blocks(view: View) -> Values:
    shares = {"used": view.used, "cached": view.cached, "empty": view.empty}
    of = view.num_kv_blocks
    return [({"state": name}, round(share * of)) for name, share in shares.items() if share is not None and of]


def _limits(view: View) -> Values:
    return [({"reason": name}, share) for name, share in view.limits]


#: Name -> type, help, and what gives its values.
METRICS: dict[str, tuple[str, str, Callable[[View], Values]]] = {
    "kvhook_kv_blocks": ("gauge", "KV blocks: used by requests, only in the prefix cache, empty", _blocks),
    "kvhook_steps_total": ("counter", "Steps of the engine", lambda v: _one(v.steps)),
    "kvhook_batch_limited_ratio": ("gauge", "Share of the last steps that this kept from doing more", _limits),
    "kvhook_prefix_cache_hit_ratio": (
        "gauge",
        "Prefix cache hits of this run, by tokens; if records were missed, since then",
        lambda v: _one(v.hit_rate_run),
    ),
    "kvhook_recomputed_tokens": (
        "gauge",
        "Tokens computed again in the window, after preemptions",
        lambda v: _one(v.recomputed),
    ),
    "kvhook_evicted_blocks": ("gauge", "Cached blocks given up in the window", lambda v: _one(v.evicted)),
    "kvhook_aborted_requests_total": (
        "counter",
        "Requests that were aborted; from 0 again if records were missed",
        lambda v: _one(v.aborted_run),
    ),
    "kvhook_step_seconds_p50": (
        "gauge",
        "Step time in the window, median",
        lambda v: _one(v.step_time and v.step_time[0]),
    ),
    "kvhook_step_seconds_p99": (
        "gauge",
        "Step time in the window, 99th percentile",
        lambda v: _one(v.step_time and v.step_time[1]),
    ),
    "kvhook_cost_seconds": ("gauge", "What kvhook takes in a step", lambda v: _one(v.cost)),
    "kvhook_records_missed_total": (
        "counter",
        "Records that were overwritten before this reader saw them",
        lambda v: _one(v.lost),
    ),
}


def as_text(views: Sequence[View]) -> str:
    """Every metric of every engine; what is not known is left out."""
    return "".join(f"{line}\n" for line in _lines(views))


def _lines(views: Sequence[View]) -> Iterator[str]:
    for name, (kind, meaning, values_of) in METRICS.items():
        values = [(view, labels, value) for view in views for labels, value in values_of(view)]
        if values:
            yield f"# HELP {name} {meaning}"
            yield f"# TYPE {name} {kind}"
        for view, labels, value in values:
            every = {"pid": str(view.pid), "engine": str(view.engine), "model": view.model, **labels}
            inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in every.items())
            yield f"{name}{{{inside}}} {value:g}" if value < 1e6 else f"{name}{{{inside}}} {value:.0f}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
