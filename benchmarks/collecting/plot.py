"""Usage over time of one run as each way saw it, one below the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from collecting.looks import Look, Run

_TRUTH, _SEEN = "#d5dbe3", "#c2410c"
#: Looks that are farther apart than this many seconds are drawn as points as well.
_POINTS = 0.5


def draw(run: Run, panels: Sequence[tuple[str, Sequence[Look], dict[str, Any]]], path: Path, about: str) -> None:
    """Draw it.

    Args:
        panels: of each way its name, its looks and its figures.
        about: a line on the run.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.fonttype"] = "none"  # text as text: smaller, and it can be selected
    matplotlib.rcParams["svg.hashsalt"] = "kvhook"
    figure: Any = Figure(figsize=(9.5, 1.45 * len(panels) + 1.1), layout="constrained")
    axes = figure.subplots(len(panels), sharex=True, sharey=True, squeeze=False)[:, 0]
    seconds, usage = _thinned((run.t - run.t[0]) / 1e9, 100 * run.usage)
    for axis, (name, looks, figures) in zip(axes, panels, strict=True):
        axis.fill_between(seconds, usage, step="post", color=_TRUTH, linewidth=0)
        t = (np.array([look.t for look in looks]) - run.t[0]) / 1e9
        seen = 100 * np.array([look.usage for look in looks])
        within = (t >= 0) & (t <= seconds[-1])
        t, seen = t[within], seen[within]
        sparse = len(t) < 2 or float(np.median(np.diff(t))) > _POINTS
        if len(t) > 1000:
            t, seen = _thinned(t, seen)
        axis.plot(t, seen, drawstyle="steps-post", color=_SEEN, linewidth=0.8)
        if sparse:
            axis.plot(t, seen, "o", color=_SEEN, markersize=3.5)
        peak = figures["peak_found"]
        found = "no peak" if peak is None else f"peak found {100 * peak:.0f} % of {100 * run.usage.max():.0f} %"
        axis.set_title(name, loc="left", fontsize=9.5, fontweight="bold")
        axis.set_title(f"{100 * figures['share_of_steps']:.3g} % of the steps, {found}", loc="right", fontsize=9)
        axis.set_ylim(0, 105)
        axis.set_xlim(0, seconds[-1])
        axis.set_yticks([0, 50, 100])
        axis.grid(axis="y", color="#eeeeee", linewidth=0.6)
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[-1].set_xlabel("seconds")
    figure.supylabel("KV cache usage, % of the blocks", fontsize=10)
    handles = [
        matplotlib.patches.Patch(color=_TRUTH, label="as it was, after every engine step"),
        matplotlib.lines.Line2D([], [], color=_SEEN, linewidth=1.2, label="as it was seen in this way"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(about, fontsize=10)
    options = {"metadata": {"Date": None}} if path.suffix == ".svg" else {"dpi": 150}
    FigureCanvasAgg(figure)
    figure.savefig(path, **options)


def _thinned(x: Any, y: Any, most: int = 1200) -> tuple[Any, Any]:
    """The same picture with fewer points: of each stretch the lowest and the highest, in order."""
    if len(x) <= 2 * most:
        return x, y
    keep: list[int] = []
    for part in np.array_split(np.arange(len(x)), most):
        keep += sorted({int(part[np.argmin(y[part])]), int(part[np.argmax(y[part])])})
    return x[keep], y[keep]
