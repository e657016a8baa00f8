"""A run as a picture for papers, with matplotlib: usage, queue, hit rate and tokens over time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvhook.errors import ExportError
from kvhook.files import written_beside
from kvhook.report.lines import Curve, Line
from kvhook.report.runs import Run

SUFFIXES = (".png", ".svg", ".pdf")
#: Panel: what is on its axis, what values are multiplied with, and its curves with their names.
_PANELS: tuple[tuple[str, float, dict[str, str]], ...] = (
    ("KV cache in use (%)", 100, {"kv_cache_usage": ""}),
    ("requests", 1, {"num_running_reqs": "running", "num_waiting_reqs": "waiting"}),
    ("hit rate (%)", 100, {"hit_rate_window": "last steps", "hit_rate_so_far": "since the start"}),
    ("tokens in a step", 1, {"num_prompt_tokens_computed": "prompt, computed", "num_generation_tokens": "generated"}),
)
#: Of Okabe and Ito, which all eyes can tell apart; and dashes for those who print without colours.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (3, 1, 1, 1)))


def draw(runs: Sequence[Run], path: Path) -> None:
    """Write the picture.

    Raises:
        ExportError: an unknown suffix, matplotlib is missing, or there is nothing to draw.
        OSError: it cannot be written.
    """
    if path.suffix not in SUFFIXES:
        raise ExportError(f"cannot tell a format from {path.name!r}: the name must end in one of {', '.join(SUFFIXES)}")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ExportError(f'{path.name} needs matplotlib, which is not installed: pip install "kvhook[plot]"') from None
    panels = [(label, factor, parts) for label, factor, names in _PANELS if (parts := list(_parts(runs, names)))]
    if not panels:
        raise ExportError(f"there is nothing to draw: {', '.join(run.name for run in runs)} holds no steps with stats")
    # text stays text, so that a paper's editor can search and change it
    with matplotlib.rc_context({"svg.fonttype": "none", "pdf.fonttype": 42, "font.size": 9}):
        figure = Figure(figsize=(7, 1.6 * len(panels) + 0.5), layout="constrained")
        axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
        for axis, (label, factor, parts) in zip(axes, panels, strict=True):
            for i, (text, x, curve) in enumerate(parts):
                _draw(axis, text, x, curve, factor, _COLOURS[i % len(_COLOURS)], _DASHES[i % len(_DASHES)])
            axis.set_ylabel(label)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
            if any(text for text, *_ in parts):
                axis.legend(loc="upper right", fontsize=7, framealpha=0.8)
        axes[-1].set_xlabel("seconds")
        with written_beside() as (opener, _):
            form, facts = path.suffix[1:], {"Date": None} if path.suffix == ".svg" else None
            figure.savefig(opener(path), format=form, dpi=160, metadata=facts)


def _parts(runs: Sequence[Run], names: dict[str, str]) -> Iterator[tuple[str, Any, Curve]]:
    """Text of the legend, times and values of each line of a panel."""
    several = sum(line.source == "steps" for run in runs for line in run.lines) > 1
    for run in runs:
        for line in run.lines:
            if line.source != "steps":
                continue
            for name, text in names.items():
                if name in line.curves:
                    yield (
                        ", ".join(t for t in (_who(run, line) if several else "", text) if t),
                        _times(run, line),
                        line.curves[name],
                    )


def _who(run: Run, line: Line) -> str:
    more = sum(other.source == "steps" for other in run.lines) > 1
    return f"{run.name}, engine {line.number}" if more else run.name


def _times(run: Run, line: Line) -> Any:
    """Begin and end of each bucket, one after the other."""
    return np.stack((line.begin, line.end), axis=1).ravel() - run.begin


def _draw(axis: Any, text: str, x: Any, curve: Curve, factor: float, colour: str, dash: Any) -> None:
    twice = [None if part is None else np.repeat(part, 2) * factor for part in curve]
    axis.plot(x, twice[0], color=colour, linestyle=dash, linewidth=1.1, label=text)
    if twice[1] is not None:
        axis.fill_between(x, twice[1], twice[2], color=colour, alpha=0.25, linewidth=0)
