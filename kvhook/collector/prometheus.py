"""Prometheus's objects as numbers. Names and types decide what a sample is, never a part of its name."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from kvhook.collector.names import CACHE_CONFIG, TIMES, TOTAL, V0_ON_CPU, VALUES
from kvhook.collector.reading import Histogram

PREFIX = "vllm:"


class Family(NamedTuple):
    """All label sets of one metric. ``kind``: counter, gauge, histogram or vector."""

    kind: str
    samples: list[tuple[dict[str, str], Any]]


def from_collectors(metrics: Iterable[Any]) -> dict[str, Family]:
    """vLLM's metrics out of what ``REGISTRY.collect()``, or a single metric's ``collect()``, gives.

    A counter's value is its ``_total`` sample. Its ``_created`` sample is the time at which it was made, in Unix
    seconds, and no count.
    """
    families: dict[str, Family] = {}
    for metric in metrics:
        if not metric.name.startswith(PREFIX) or metric.type not in ("counter", "gauge", "histogram"):
            continue
        samples = families.setdefault(metric.name, Family(metric.type, [])).samples
        if metric.type == "histogram":
            samples += _histograms(metric)
        else:
            wanted = metric.name + ("_total" if metric.type == "counter" else "")
            samples += [(dict(s.labels), s.value) for s in metric.samples if s.name == wanted]
    return families


def from_snapshot(metrics: Iterable[Any]) -> dict[str, Family]:
    """The same out of what ``LLM.get_metrics()`` gives: vLLM's Counter, Gauge, Histogram and Vector objects."""
    families: dict[str, Family] = {}
    for metric in metrics:
        kind = type(metric).__name__.lower()
        if kind == "histogram":
            value: Any = Histogram(int(metric.count), float(metric.sum), {k: int(v) for k, v in metric.buckets.items()})
        else:
            value = list(metric.values) if kind == "vector" else metric.value
        families.setdefault(metric.name, Family(kind, [])).samples.append((dict(metric.labels), value))
    return families


def numbers(families: dict[str, Family]) -> dict[str, float]:
    """The collector's values: a counter summed over its label sets, a state summed, a share (usage) averaged."""
    out: dict[str, float] = {}
    for value in VALUES:
        kind = "counter" if value.kind == TOTAL else "gauge"
        for name in value.metrics:
            family = families.get(name)
            found = [float(v) for _, v in family.samples] if family is not None and family.kind == kind else []
            if not found or not all(map(math.isfinite, found)):
                continue
            total = sum(found)
            if kind == "counter" or value.name.startswith("num_"):
                out[value.name] = int(total)
            else:
                out[value.name] = total / len(found)
            break
    return out


def v0_on_cpu(families: dict[str, Family]) -> dict[str, float]:
    """The values that V0 on a CPU keeps elsewhere."""
    out = {}
    for name, metric in V0_ON_CPU.items():
        family = families.get(metric)
        found = [float(v) for _, v in family.samples] if family is not None and family.kind == "gauge" else []
        if found and all(map(math.isfinite, found)):
            out[name] = sum(found) / len(found)
    return out


def histograms(families: dict[str, Family]) -> dict[str, Histogram]:
    """The collector's histograms, summed over label sets."""
    out = {}
    for times in TIMES:
        for name in times.metrics:
            family = families.get(name)
            if family is None or family.kind != "histogram" or not family.samples:
                continue
            parts: list[Histogram] = [h for _, h in family.samples]
            bounds = dict.fromkeys(bound for h in parts for bound in h.buckets)
            out[times.name] = Histogram(
                sum(h.count for h in parts),
                sum(h.sum for h in parts),
                {bound: sum(h.buckets.get(bound, 0) for h in parts) for bound in bounds},
            )
            break
    return out


def prefix_caching(families: dict[str, Family]) -> bool | None:
    """Whether prefix caching is on, from the configuration that vLLM puts into labels; None if it is not there."""
    family = families.get(CACHE_CONFIG)
    said = {labels.get("enable_prefix_caching") for labels, _ in family.samples} if family else set()
    return {"True": True, "False": False}.get(str(said.pop())) if len(said) == 1 else None


def as_json(families: dict[str, Family]) -> dict[str, Any]:
    """Everything, as JSON can hold it: a number or histogram for a metric with one label set, else a list."""
    out: dict[str, Any] = {}
    for name, family in families.items():
        samples = [(labels, _json_sample(value)) for labels, value in family.samples]
        if len(samples) == 1 and name != CACHE_CONFIG:
            out[name] = samples[0][1]
        else:
            out[name] = [{"labels": labels, "value": value} for labels, value in samples]
    return out


def _json_sample(value: Any) -> Any:
    if isinstance(value, Histogram):
        return value.as_dict()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _histograms(metric: Any) -> list[tuple[dict[str, str], Histogram]]:
    """A metric's histograms, one per label set."""
    found: dict[tuple[tuple[str, str], ...], dict[str, Any]] = {}
    for s in metric.samples:
        what = s.name.removeprefix(metric.name)
        labels = {k: v for k, v in s.labels.items() if k != "le"}
        one = found.setdefault(tuple(sorted(labels.items())), {"buckets": {}})
        if what == "_bucket":
            one["buckets"][s.labels["le"]] = int(s.value)
        elif what in ("_count", "_sum"):
            one[what] = s.value
    return [
        (dict(labels), Histogram(int(one["_count"]), float(one["_sum"]), one["buckets"]))
        for labels, one in found.items()
        if "_count" in one and "_sum" in one
    ]
