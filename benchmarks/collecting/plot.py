"""Usage over time of one run as each way saw it, one below the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from collecting.looks import Look, Run

_TRUTH, _SEEN = "#d3dae3", "#c2410c"
#: Looks that are farther apart than this share of the time that is drawn have a point each.
_POINTS = 1 / 150
#: Seconds of the part that is drawn larger.
_PART = 2.0


def draw(run: Run, panels: Sequence[tuple[str, Sequence[Look], dict[str, Any]]], path: Path, about: str) -> None:
    """Draw it: on the left the whole run, on the right the two seconds around its peak.

    Args:
        panels: of each way its name, its looks and its figures.
        about: a line on the run.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from PIL import Image  # comes with matplotlib

    matplotlib.rcParams["svg.fonttype"] = "none"  # text as text: smaller, and it can be selected
    matplotlib.rcParams["svg.hashsalt"] = "kvhook"
    figure: Any = Figure(figsize=(11, 1.4 * len(panels) + 1.2), layout="constrained")
    axes = figure.subplots(len(panels), 2, sharex="col", sharey=True, squeeze=False, width_ratios=(2.4, 1))
    seconds, usage = (run.t - run.t[0]) / 1e9, 100 * run.usage
    middle = float(seconds[np.argmax(usage)])
    start = min(max(0.0, middle - _PART / 2), max(0.0, seconds[-1] - _PART))
    parts = 500 if path.suffix == ".svg" else 2000  # an SVG grows with its points
    windows = ((0.0, float(seconds[-1])), (start, start + _PART))
    for row, (name, looks, figures) in zip(axes, panels, strict=True):
        t = (np.array([look.t for look in looks]) - run.t[0]) / 1e9
        seen = 100 * np.array([look.usage for look in looks])
        for axis, window in zip(row, windows, strict=True):
            axis.fill_between(*_thinned(seconds, usage, window, parts), step="post", color=_TRUTH, linewidth=0)
            x, y = _thinned(t, seen, window, parts)
            axis.plot(x, y, drawstyle="steps-post", color=_SEEN, linewidth=0.9)
            if np.sum((t >= window[0]) & (t <= window[1])) * _POINTS < 1:
                axis.plot(x, y, "o", color=_SEEN, markersize=3.2, clip_on=True, zorder=3)
            _dress(axis, window)
        peak = figures["peak_found"]
        found = "no peak found" if peak is None else f"highest usage found {100 * peak:.0f} %"
        row[0].set_title(name, loc="left", fontsize=10, fontweight="bold")
        row[0].set_title(f"{share(figures['share_of_steps'])} of the steps, {found}", loc="right", fontsize=9.5)
    axes[0, 1].set_title(f"{_PART:g} s around the peak", loc="left", fontsize=9.5)
    for axis in axes[-1]:
        axis.set_xlabel("seconds")
    figure.supylabel("KV cache usage, % of the blocks", fontsize=10)
    handles = [
        Patch(color=_TRUTH, label="as it was, after every engine step"),
        Line2D([], [], color=_SEEN, linewidth=1.2, label="as it was seen in this way"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9.5)
    figure.suptitle(about, fontsize=10.5)
    if path.suffix == ".svg":
        figure.savefig(path, metadata={"Date": None})
        return
    figure.set_dpi(130)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    # few colours are needed, and a third of the bytes
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(48).save(path, optimize=True)


def share(of_steps: float) -> str:
    """A share as text with two digits that say something, and none that do not."""
    return "100 %" if of_steps == 1 else f"{100 * of_steps:.{1 if of_steps >= 0.01 else 2}f} %"


def _dress(axis: Any, window: tuple[float, float]) -> None:
    axis.set_ylim(-3, 106)
    axis.set_xlim(*window)
    axis.set_yticks([0, 50, 100])
    axis.grid(axis="y", color="#eeeeee", linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _thinned(x: Any, y: Any, window: tuple[float, float], parts: int) -> tuple[Any, Any]:
    """What lies in a window, and one value before and behind it; of a great many, of each stretch the lowest and the
    highest, in order: the same picture with fewer points."""
    first, last = np.searchsorted(x, window)
    x, y = x[max(0, first - 1) : last + 1], y[max(0, first - 1) : last + 1]
    if len(x) <= 2 * parts:
        return x, y
    keep: list[int] = []
    for part in np.array_split(np.arange(len(x)), parts):
        keep += sorted({int(part[np.argmin(y[part])]), int(part[np.argmax(y[part])])})
    return x[keep], y[keep]
