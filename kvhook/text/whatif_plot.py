"""The hit-rate curve as a picture. Needs matplotlib (``pip install "kvhook[plot]"``)."""

from __future__ import annotations

from pathlib import Path

from kvhook.errors import KvhookError
from kvhook.files import written_beside
from kvhook.whatif.report import WhatIf


def plot(w: WhatIf, path: Path) -> None:
    """Draw the curve of a plain LRU cache, the sizes that were told, the ceiling and where the run was.

    Args:
        w: what is drawn.
        path: the picture; its suffix says of which kind.

    Raises:
        KvhookError: matplotlib is not there, or does not know the suffix.
        OSError: it cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise KvhookError('a picture needs matplotlib: pip install "kvhook[plot]"') from None
    if not path.suffix:
        raise KvhookError(f"cannot draw {path}: its name must say what it is to be, such as .png or .svg")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    total = max(w.query_tokens, 1) / 100
    least = min((size.blocks for size in w.sizes), default=1)
    shown = [(n, hits / total) for n, hits in w.curve if n >= least * 0.7]
    axes.plot(*zip(*shown, strict=True), color="0.6", label="plain LRU cache") if shown else None
    for sizes, label, color in ((w.sizes, "as it ran", "C0"), (w.reordered, "longest prefix first", "C2")):
        if sizes:
            blocks, hits = [size.blocks for size in sizes], [size.hit_tokens / total for size in sizes]
            axes.plot(blocks, hits, "o-", color=color, label=label)
    axes.axhline(w.ceiling_hit_tokens / total, color="0.3", linestyle=":", label="ceiling")
    if w.hit_tokens is not None and w.blocks:
        axes.plot([w.blocks], [w.hit_tokens / total], "D", color="C3", markersize=9, label="this run")
    axes.set(
        xscale="log", xlabel=f"KV blocks of {w.block_size} tokens", ylabel="prompt tokens found, %", ylim=(0, None)
    )
    axes.legend()
    axes.grid(alpha=0.3)
    try:
        with written_beside() as (opener, _):
            figure.savefig(opener(path), format=path.suffix[1:], dpi=130)
    except ValueError as error:
        raise KvhookError(f"cannot draw {path}: {error}") from None
