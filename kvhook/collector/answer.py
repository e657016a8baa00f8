"""The collector's answers: plain dictionaries that ``json.dumps`` takes, in the names that scripts expect."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from kvhook.analysis.history import STATES, TOTALS, count_or_share
from kvhook.collector.names import KEYS, METRIC_KEYS, TIMES, UNAVAILABLE, V0_RATE, VALUES, Times
from kvhook.collector.reading import Reading

if TYPE_CHECKING:
    import numpy as np

    from kvhook.analysis.history import History

#: Every name that is in the key metrics: compatible ones, and vLLM's own.
_ALL = (*(k.key for k in KEYS), "prefix_cache_hit_rate", *(v.name for v in VALUES if v.name != V0_RATE))
#: The usage's peak of the monitored time, as a share and in percent.
PEAKS = ("kv_cache_usage_peak", "gpu_cache_usage_peak_percent")
_NO_VALUE_YET = "no value has been counted yet"


class Known(dict[str, float]):
    """The values that are known. A name of which the value is not known gives None, and is not in the dictionary.

    So a script may look before it asks, go through the items and format each, or take a default with ``get``; nobody
    takes an answer that holds nothing for one that does.
    """

    def __missing__(self, name: str) -> None:
        if name not in _NAMES:
            raise KeyError(name)


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
    why = {} if reading else {"error": "; ".join(f"{source}: {reason}" for source, reason in reasons.items())}
    return {
        "timestamp": timestamp,
        "collection_time": timestamp,
        "collection_method": reading.source if reading else UNAVAILABLE,
        "stats_available": reading is not None,
        "metrics_found": metrics,
        "absent": absent_of(reading),
        "histogram_data": histograms,
        "total_metrics_found": len(metrics),
        "total_histograms_found": len(histograms),
        "debug_info": {
            "methods_attempted": [*reasons, *([reading.source] if reading else [])],
            "not_available": dict(reasons),
            "counted_since": reading.since if reading else None,
            "collection_seconds": seconds,
        },
        **why,
    }


def metrics_of(reading: Reading | None) -> dict[str, float]:
    """Every value that is known, under vLLM's current name, each compatible one, and those of vLLM's metrics."""
    if reading is None:
        return {}
    out = {name: value for name, value in reading.values.items() if math.isfinite(value)}
    return out | {k.key: k.factor * out[k.value] for k in (*KEYS, *METRIC_KEYS) if k.value in out}


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
            for name in filter(None, (times.name, times.also, *times.metrics)):
                out[name] = reading.histograms[times.name].as_dict()
    return out


def key_metrics(reading: Reading | None, peak: float | None) -> Known:
    """The compatible keys and vLLM's current names. `peak` is that of the usage."""
    metrics = metrics_of(reading)
    out = Known((name, metrics[name]) for name in _ALL if name in metrics)
    if peak is not None:
        out.update(zip(PEAKS, (peak, 100 * peak), strict=True))
    return out


def histogram_analysis(reading: Reading | None) -> Known:
    """Mean in seconds and count of each histogram."""
    out = Known()
    for times in TIMES:
        found = reading.histograms.get(times.name) if reading and times.average else None
        if found is not None:
            out[times.total] = found.count
            if found.count:
                out[times.average] = found.sum / found.count
    return out


def _names_of(times: Times) -> tuple[str, ...]:
    """Every name under which a histogram, its mean or its count is looked for."""
    return tuple(filter(None, (times.name, times.also, times.average, times.total)))


def last_time(latest: dict[str, Any], rows: History) -> float | None:
    """Unix time of the last collection that found something; None if none has."""
    if latest["stats_available"]:
        return float(latest["timestamp"])
    return float(rows["timestamp"][-1]) if len(rows) else None


_NAMES = frozenset((*_ALL, *PEAKS, *(name for times in TIMES for name in _names_of(times))))


def of_row(method: str, row: np.void) -> dict[str, Any]:
    """A row of the history as a collection."""
    values = {name: count_or_share(name, row[name]) for name in (*STATES, *TOTALS) if row[name] == row[name]}
    return collection(Reading(method, values, {}, {}, {}, None, ""), {}, float(row["timestamp"]), 0.0)
