"""The history as a picture."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvhook.collector.names import V0_RATE
from kvhook.collector.optional import need

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvhook.analysis.history import Monitored

#: Up to so many rows each is marked: a line alone would not show a single one.
_MARKED = 100


def draw(parts: Sequence[Monitored], how: str, why_no_rate: str, path: Path) -> Path:
    """Usage, requests and hit rate, one below the other, over seconds since the first row.

    Args:
        parts: the monitored times, each with a row at least. Between them nothing is drawn.
        how: where the rows come from; the title.
        why_no_rate: stands in the place of the hit rate if there is none.

    Raises:
        KvhookError: matplotlib is not installed.
    """
    need("matplotlib", "plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # needs no display, and leaves the user's pyplot alone
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure: Any = Figure(figsize=(9, 7), layout="constrained")
    figure.suptitle(how, fontsize="medium")
    usage, requests, rate = figure.subplots(3, sharex=True)
    seconds = np.concatenate([part.rows["t"] for part in parts])
    seconds -= seconds[0]
    # a line holds until the next row, but not over the time between two parts
    gaps = np.cumsum([len(part.rows) for part in parts])[:-1]
    marker = "." if len(seconds) <= _MARKED else ""

    def line(axes: Any, values: npt.NDArray[np.float64], **style: Any) -> None:
        x, y = np.insert(seconds, gaps, np.nan), np.insert(values, gaps, np.nan)
        axes.plot(x, y, drawstyle="steps-post", marker=marker, linewidth=1.2, **style)

    def column(name: str) -> npt.NDArray[np.float64]:
        return np.concatenate([part.rows[name] for part in parts])

    used = 100 * column("kv_cache_usage")
    line(usage, used)
    usage.set(ylabel="KV cache usage, %", ylim=(-2, 105))
    if (used == used).any():
        _note(usage, f"peak {np.nanmax(used):.1f} %")
    for name, label in (("num_running_reqs", "running"), ("num_waiting_reqs", "waiting")):
        line(requests, column(name), label=label)
    requests.set(ylabel="requests")
    most = np.nanmax([1.0, *column("num_running_reqs"), *column("num_waiting_reqs")])
    requests.set_ylim(-0.05 * most, 1.05 * most)
    requests.yaxis.set_major_locator(MaxNLocator(integer=True))
    requests.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, borderaxespad=0, fontsize="small")

    label, share = "hit rate so far, %", 100 * np.concatenate([part.hit_rate for part in parts])
    v0 = 100 * column(V0_RATE)
    if (v0 >= 0).any():
        label, share = "hit rate of blocks, %", np.where(v0 >= 0, v0, np.nan)
    rate.set(ylabel=label, ylim=(-2, 105), xlabel="seconds")
    if (share == share).any():
        line(rate, share)
        _note(rate, f"{share[share == share][-1]:.1f} % at the end")
    else:
        text = textwrap.fill(why_no_rate, 70)
        rate.text(0.5, 0.5, text, ha="center", va="center", transform=rate.transAxes, color="0.4")
    FigureCanvasAgg(figure).print_figure(path, dpi=120)
    return path


def _note(axes: Any, text: str) -> None:
    """A number above a panel, at its right end."""
    axes.set_title(text, loc="right", fontsize="small", pad=4)
