"""Summaries and traces as HTML, as a notebook shows them. Every text is escaped; there is no script in it."""

from __future__ import annotations

from html import escape

import numpy as np

from kvhook.analysis.compare import side_by_side
from kvhook.analysis.summary import Summary
from kvhook.records.columns import Table, has
from kvhook.text.compare import cell

#: Size of the small picture, and how many points it has at most.
_WIDTH, _HEIGHT, _POINTS = 560, 90, 280
_CELL = "padding:2px 18px 2px 0;text-align:{};border:0"


def summary_html(s: Summary) -> str:
    """The numbers of a summary as a table, in two columns."""
    if not s.steps:
        return f"<p><b>kvhook</b>: no steps yet. {escape(s.why_no_steps or 'The trace holds none.')}</p>"
    cells = [(row.label, cell(row, row.values[0])) for row in side_by_side([s]) if row.values[0] is not None]
    cells = [(label, text) for label, text in cells if text != "-"]
    half = (len(cells) + 1) // 2
    rows = []
    for i in range(half):
        row = [*cells[i], *(cells[half + i] if half + i < len(cells) else ("", ""))]
        rows.append(
            "".join(
                f'<td style="{_CELL.format("right" if n % 2 else "left")}">{escape(text)}</td>'
                for n, text in enumerate(row)
            )
        )
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<table class="kvhook" style="font-variant-numeric:tabular-nums">{body}</table>'


def trace_html(name: str, summary: Summary, steps: Table) -> str:
    """A trace: its usage as a small picture, and its summary."""
    return f"<p><b>{escape(name)}</b></p>{usage_svg(steps)}{summary_html(summary)}"


def usage_svg(steps: Table) -> str:
    """KV usage over time as a drawing; "" where it is not known.

    Args:
        steps: with ``t_end_ns`` and ``kv_cache_usage``.
    """
    if not has(steps, "kv_cache_usage"):
        return ""
    known = steps[~np.isnan(steps["kv_cache_usage"])]
    if not len(known):
        return ""
    t = (known["t_end_ns"] - known["t_end_ns"].min()) / 1e9
    last = float(t.max()) or 1.0
    place = np.minimum((t / last * _POINTS).astype(np.int64), _POINTS - 1)
    highest = np.full(_POINTS, np.nan)
    np.fmax.at(highest, place, known["kv_cache_usage"])
    there = (~np.isnan(highest)).nonzero()[0]
    points = " ".join(f"{i / _POINTS * _WIDTH:.1f},{_HEIGHT - 14 - highest[i] * (_HEIGHT - 28):.1f}" for i in there)
    text = f"KV cache in use, at most {100 * float(known['kv_cache_usage'].max()):.1f} %, over {last:,.1f} s"
    line = f'<line x1="0" x2="{_WIDTH}" stroke="currentColor" stroke-opacity="0.25"'
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" role="img" aria-label="{text}">'
        f'{line} y1="14" y2="14" stroke-dasharray="3 4"/>{line} y1="{_HEIGHT - 14}" y2="{_HEIGHT - 14}"/>'
        f'<polyline points="{points}" fill="none" stroke="#3d8fc4" stroke-width="1.5"/>'
        f'<text x="0" y="10" font-size="10" fill="currentColor">{text}</text></svg>'
    )
