"""What other KV caches would have found, as HTML: advice, a curve over the sizes, and their numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from kvhook.records.core import CoreRecords
from kvhook.report.runs import Run
from kvhook.report.tables import table, wide
from kvhook.text.numbers import percent, seconds
from kvhook.whatif.advice import findings
from kvhook.whatif.recorded import NotKnown
from kvhook.whatif.report import Size, WhatIf, what_if
from kvhook.whatif.runs import run_of

#: A report plays a run again with other caches if its requests have no more blocks than this; `kvhook whatif` has more
#: patience.
MOST_BLOCKS = 100_000

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 760, 260, 54, 14, 12, 34


def other_caches(cores: CoreRecords, name: str) -> WhatIf | str:
    """What other caches would have found with a run, or why that is not known."""
    try:
        requests, run = run_of(cores, name)
    except NotKnown as why:
        return str(why)
    if not len(requests):
        return "no request has been looked up"
    if len(requests.ids) > MOST_BLOCKS:
        return f"its {len(requests):,} requests take long to be played again with other caches: kvhook whatif does it"
    return what_if(requests, run)


def section(runs: Sequence[Run]) -> str:
    """What stands in the section: of each run what is known."""
    out = ""
    for run in runs:
        head = f"<h4>{escape(run.name)}</h4>" if len(runs) > 1 else ""
        if isinstance(run.other_caches, str):
            out += f"<p class=absent><b>{escape(run.name)}</b>: {escape(run.other_caches)}</p>"
        else:
            warmup = "<p class=explain>Warm-up counts here.</p>" if any(s.warmup for s in run.scopes) else ""
            out += head + _advice(run.other_caches) + _figure(run.other_caches) + warmup + _sizes(run.other_caches)
    return out


def _advice(w: WhatIf) -> str:
    lines = "".join(f"<li>{escape(finding.text)}</li>" for finding in findings(w))
    return f"<ul class=findings>{lines}</ul>" if lines else "<p>Nothing would have found more.</p>"


def _sizes(w: WhatIf) -> str:
    heads = ["blocks", "tokens", "found", "plain LRU", "preempted", "prefill time saved"]
    rows = []
    for size in w.sizes:
        here = " (this run)" if size.blocks == w.blocks else ""
        saved = "" if size.seconds_saved is None else seconds(size.seconds_saved)
        preempted = "" if size.num_preemptions is None else f"{size.num_preemptions:,}"
        found = f"{'' if size.exact else '~ '}{percent(_rate(size.hit_tokens, w))}"
        rows.append(
            (
                f"{size.blocks:,}{here}",
                f"{size.tokens:,}",
                found,
                percent(_rate(size.lru_hit_tokens, w)),
                preempted,
                saved,
            )
        )
    why = list(dict.fromkeys(reason for size in w.sizes for reason in size.why_estimated))
    estimated = f"<p class=explain>~ is an estimate: {escape('; '.join(why))}.</p>" if why else ""
    numbers = f"<details><summary>the numbers</summary>{wide(table(heads, rows))}{estimated}</details>"
    return numbers


def _rate(tokens: int, w: WhatIf) -> float:
    return tokens / w.query_tokens if w.query_tokens else math.nan


class _Scale:
    """Blocks, on a logarithmic axis, and hit rates as places in the figure."""

    def __init__(self, w: WhatIf) -> None:
        blocks = [size.blocks for size in w.sizes]
        self.first, self.last = max(min(blocks), 1), max(*blocks, 2)
        self._log = math.log(self.last / self.first) or 1.0

    def x(self, blocks: float) -> float:
        """Where a number of blocks is."""
        share = min(max(math.log(max(blocks, 1) / self.first) / self._log, 0.0), 1.0)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(self, rate: float) -> float:
        """Where a hit rate is."""
        return _TOP + (1 - rate) * (_HEIGHT - _TOP - _BOTTOM)

    def marks(self) -> list[int]:
        """Sizes that are written at the axis: 1, 2 and 5 times powers of ten."""
        found = [m * 10**e for e in range(12) for m in (1, 2, 5) if self.first <= m * 10**e <= self.last]
        return found or [self.first]


def _figure(w: WhatIf) -> str:
    """The share that is found by the number of blocks. Lines and marks can be told apart without colours."""
    if not w.query_tokens or not w.sizes:
        return ""
    scale = _Scale(w)
    marks = (0, 0.25, 0.5, 0.75, 1)
    parts = [_line(scale.x(scale.first), scale.y(r), scale.x(scale.last), scale.y(r), "grid") for r in marks]
    parts += [_text(_LEFT - 6, scale.y(r) + 4, f"{100 * r:.0f}%", "end") for r in marks]
    parts += [_text(scale.x(n), _HEIGHT - _BOTTOM + 16, f"{n:,}", "middle") for n in scale.marks()]
    parts.append(_text(_WIDTH - _RIGHT, _HEIGHT - 2, "KV blocks", "end"))
    lru = [(n, tokens) for n, tokens in w.curve if scale.first <= n <= scale.last]
    parts.append(_path([(scale.x(n), scale.y(_rate(tokens, w))) for n, tokens in lru], "lru"))
    parts.append(_path([(scale.x(s.blocks), scale.y(_rate(s.hit_tokens, w))) for s in w.sizes], "engine"))
    parts += [_mark(scale, size, w) for size in w.sizes]
    ceiling = _rate(w.ceiling_hit_tokens, w)
    parts.append(_line(scale.x(scale.first), scale.y(ceiling), scale.x(scale.last), scale.y(ceiling), "ceiling"))
    parts.append(_text(scale.x(scale.first) + 4, scale.y(ceiling) - 4, f"ceiling {percent(ceiling)}", "start"))
    if w.blocks:
        x = scale.x(w.blocks)
        parts.append(_line(x, scale.y(0), x, scale.y(1), "here"))
        left = x > _WIDTH / 2
        parts.append(
            _text(x + (-5 if left else 5), scale.y(0) - 6, f"this run: {w.blocks:,}", "end" if left else "start")
        )
    label = "Share of the looked-up tokens that a cache of so many blocks finds"
    key = (
        "<p class=explain>The share of the looked-up tokens that so many KV blocks find. Solid: this engine played "
        "again; a filled mark is exact, a hollow one an estimate. Dashed: a plain LRU cache. Dotted: what no cache "
        "exceeds.</p>"
    )
    view = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}"'
    return f"{key}<svg class=curve {view}>{''.join(parts)}</svg>"


def _line(x0: float, y0: float, x1: float, y1: float, kind: str) -> str:
    return f'<line class={kind} x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"/>'


def _path(points: Sequence[tuple[float, float]], kind: str) -> str:
    return f'<polyline class={kind} points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>' if points else ""


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _mark(scale: _Scale, size: Size, w: WhatIf) -> str:
    rate = _rate(size.hit_tokens, w)
    title = f"{size.blocks:,} blocks: {'' if size.exact else 'about '}{percent(rate)} found"
    kind = "exact" if size.exact else "estimate"
    at = f'cx="{scale.x(size.blocks):.1f}" cy="{scale.y(rate):.1f}" r="4"'
    return f"<circle class={kind} {at}><title>{escape(title)}</title></circle>"
