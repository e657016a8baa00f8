"""A run in windows, as text: a line with a picture for each number, and a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from kvhook.analysis.windows import NUMBERS, Windows
from kvhook.text.bar import shows_blocks, sparkline
from kvhook.text.numbers import percent, seconds

#: A picture is at most so wide: several windows share a character beyond it.
WIDTH = 60
#: What the table holds: name, heading, width.
TABLE = (
    ("kv_cache_usage_mean", "usage", 8),
    ("num_running_reqs_mean", "running", 9),
    ("num_waiting_reqs_mean", "waiting", 9),
    ("prefix_cache_hit_rate", "hit rate", 10),
    ("generation_tokens_per_second", "tokens/s", 10),
    ("num_preempted_reqs", "preempted", 11),
    ("time_to_first_token_p50", "TTFT p50", 10),
    ("inter_token_latency_p50", "ITL p50", 10),
    ("inter_token_latency_p99", "ITL p99", 10),
)
_UNITS = {number.name: number.unit for number in NUMBERS}


class PrintedWindows(Windows):
    """`Windows` that ``print`` shows as pictures and a table."""

    def __str__(self) -> str:
        return as_text(self, ascii_only=not shows_blocks())


def printed(windows: Windows) -> PrintedWindows:
    """The same numbers, as an object that prints."""
    return PrintedWindows(**{f.name: getattr(windows, f.name) for f in dataclasses.fields(windows)})


def as_text(windows: Windows, *, ascii_only: bool = False) -> str:
    """Pictures and a table.

    Args:
        windows: what is shown.
        ascii_only: draw with ASCII alone.
    """
    return "\n".join(_lines(windows, ascii_only))


def _lines(w: Windows, ascii_only: bool) -> Iterator[str]:
    if not len(w):
        yield "no steps, no windows"
        return
    each = seconds(float(w.edges[1] - w.edges[0]))
    yield f"{len(w):,} window{'s' * (len(w) > 1)} of {each}; a step counts where it ended"
    width = min(len(w), WIDTH)
    yield f"  {'':26}{'':{width}}{'lowest':>11}{'highest':>11}{'last':>11}"
    for number in NUMBERS:
        values = w.numbers[number.name]
        known = values[~np.isnan(values)]
        if not len(known) or (number.name == "num_preempted_reqs" and not known.any()):
            continue
        cells = "".join(f"{_written(number.unit, v):>11}" for v in (known.min(), known.max(), known[-1]))
        top = 1.0 if number.unit == "share" else float(known.max())
        yield f"  {number.label:26}{sparkline(_narrow(values, width), top, ascii_only=ascii_only)}{cells}"
    yield ""
    yield f"{'from':>10}" + "".join(f"{heading:>{wide}}" for _, heading, wide in TABLE)
    for i, begin in enumerate(w.edges[:-1].tolist()):
        cells = "".join(f"{_written(_UNITS[name], float(w.numbers[name][i])):>{wide}}" for name, _, wide in TABLE)
        yield f"{seconds(begin):>10}{cells}"


def _narrow(values: npt.NDArray[np.float64], width: int) -> list[float]:
    """One value for each character: of several windows the largest, so that no peak is hidden."""
    parts = (part[~np.isnan(part)] for part in np.array_split(values, width))
    return [float(part.max()) if len(part) else float("nan") for part in parts]


def _written(unit: str, value: float) -> str:
    if value != value:
        return "-"
    if unit == "share":
        return percent(value)
    if unit == "s":
        return seconds(value)
    return f"{value:,.0f}" if unit == "count" or abs(value) >= 100 else f"{value:.3g}"
