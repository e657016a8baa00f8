"""The history as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvhook.collector.collector import need

if TYPE_CHECKING:
    from kvhook.analysis.history import History


def draw(rows: History, method: str, path: Path) -> Path:
    """Usage, requests and hit rate, one below the other, over seconds.

    Raises:
        KvhookError: matplotlib is not installed.
    """
    need("matplotlib", "plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, and nobody's pyplot is touched
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(9, 7), layout="constrained")
    usage, requests, rate = figure.subplots(3, sharex=True)
    seconds = rows["t"] - rows["t"][0]
    usage.plot(seconds, 100 * rows["kv_cache_usage"], drawstyle="steps-post")
    usage.set(ylabel="KV cache usage, %", ylim=(0, 105), title=f"source: {method}, {len(rows)} rows")
    for name, label in (("num_running_reqs", "running"), ("num_waiting_reqs", "waiting")):
        requests.plot(seconds, rows[name], drawstyle="steps-post", label=label)
    requests.set(ylabel="requests")
    requests.legend(loc="upper right")
    queries, hits = rows["prefix_cache_queries"], rows["prefix_cache_hits"]
    share = np.divide(100 * hits, queries, out=np.full(len(rows), np.nan), where=queries > 0)
    rate.plot(seconds, share)
    rate.set(ylabel="hit rate so far, %", ylim=(0, 105), xlabel="seconds")
    FigureCanvasAgg(figure).print_figure(path, dpi=120)
    return path
