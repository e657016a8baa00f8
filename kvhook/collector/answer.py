"""The collector's answers: plain dictionaries that ``json.dumps`` takes, in the names that scripts expect."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from kvhook.analysis.history import STATES, TOTALS, count_or_share
from kvhook.collector.names import KEYS, TIMES, UNAVAILABLE, V0_RATE, VALUES, Times
from kvhook.collector.reading import Reading

if TYPE_CHECKING:
    import numpy as np

#: Every name that is in the key metrics: compatible ones, and vLLM's own.
_ALL = (*(k.key for k in KEYS), "prefix_cache_hit_rate", *(v.name for v in VALUES if v.name != V0_RATE))
#: The usage's peak of the monitored time, as a share and in percent.
PEAKS = ("kv_cache_usage_peak", "gpu_cache_usage_peak_percent")
_NO_VALUE_YET = "no value has been counted yet"


def collection(reading: Reading | None, reasons: dict[str, str], timestamp: float, seconds: float) -> dict[str, Any]:
    """One collection.

    Args:
        reading: what was found; None if no source could be read.
        reasons: source -> why it could not be read, of those that were tried.
        timestamp: Unix time, in seconds.
        seconds: what the collection took.
    """
    metrics = metrics_of(reading)
    histograms = histograms_of(reading)
    return {
        "timestamp": timestamp,
        "collection_method": reading.source if reading else UNAVAILABLE,
        "stats_available": reading is not None,
        "metrics_found": metrics,
        "absent": absent_of(reading),
        "histogram_data": histograms,
        "total_metrics_found": sum(v is not None for v in metrics.values()) + len(histograms),
        "debug_info": {
            "not_available": dict(reasons),
            "counted_since": reading.since if reading else None,
            "collection_seconds": seconds,
        },
    }


def metrics_of(reading: Reading | None) -> dict[str, float]:
    """Every value that is known, under vLLM's current name and under each compatible one."""
    if reading is None:
        return {}
    out = {name: value for name, value in reading.values.items() if math.isfinite(value)}
    return out | {k.key: k.factor * out[k.value] for k in KEYS if k.value in out}


def absent_of(reading: Reading | None) -> dict[str, str]:
    """Every key that has no value, and why."""
    if reading is None:
        why = "no source can be read; debug_info['not_available'] says why"
        return dict.fromkeys((*_ALL, *(name for times in TIMES for name in _names_of(times))), why)
    out = dict(reading.absent)
    out |= {k.key: out[k.value] for k in KEYS if k.value in out}
    for times in TIMES:
        if times.name in out:
            out |= dict.fromkeys(_names_of(times), out[times.name])
        elif times.average and not reading.histograms[times.name].count:
            out[times.average] = _NO_VALUE_YET
    return out


def histograms_of(reading: Reading | None) -> dict[str, Any]:
    """Every histogram, under each of its names."""
    out: dict[str, Any] = {}
    for times in TIMES:
        if reading is not None and times.name in reading.histograms:
            for name in filter(None, (times.name, times.also)):
                out[name] = reading.histograms[times.name].as_dict()
    return out


def key_metrics(reading: Reading | None, peak: float | None) -> dict[str, float | None]:
    """The compatible keys and vLLM's current names; None for what is absent. `peak` is that of the usage."""
    metrics = metrics_of(reading)
    out: dict[str, float | None] = {name: metrics.get(name) for name in _ALL}
    return out | dict(zip(PEAKS, (peak, None if peak is None else 100 * peak), strict=True))


def histogram_analysis(reading: Reading | None) -> dict[str, float | None]:
    """Mean in seconds and count of each histogram; None where there is none."""
    out: dict[str, float | None] = {}
    for times in TIMES:
        if times.average:
            found = reading.histograms.get(times.name) if reading else None
            out[times.average] = found.sum / found.count if found and found.count else None
            out[times.total] = found.count if found else None
    return out


def _names_of(times: Times) -> tuple[str, ...]:
    """Every name under which a histogram, its mean or its count is looked for."""
    return tuple(filter(None, (times.name, times.also, times.average, times.total)))


def of_row(method: str, row: np.void) -> dict[str, Any]:
    """A row of the history as a collection."""
    values = {name: count_or_share(name, row[name]) for name in (*STATES, *TOTALS) if row[name] == row[name]}
    return collection(Reading(method, values, {}, {}, {}, None, ""), {}, float(row["timestamp"]), 0.0)
