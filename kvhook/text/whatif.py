"""A `WhatIf` as a page of text: where the run was, what is lost, what each size of the cache would have found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvhook.text.numbers import of_bytes, percent, seconds
from kvhook.whatif.advice import findings
from kvhook.whatif.report import Size, WhatIf

_WIDTH = 16


def as_text(w: WhatIf) -> str:
    """The whole page, lines of at most 100 characters where texts from elsewhere allow it."""
    return "\n".join(_lines(w))


def _lines(w: WhatIf) -> Iterator[str]:
    blocks = f"blocks of {w.block_size} tokens"
    yield f"{f'{w.name}: ' if w.name else ''}{w.num_requests:,} requests, {w.query_tokens:,} tokens looked up, {blocks}"
    yield from _here(w)
    yield from _losses(w)
    yield ""
    yield from _table(w.sizes, w)
    if w.reordered:
        yield ""
        yield "  in longest-prefix-first order"
        yield from _table(w.reordered, w)
    if w.fleet:
        yield ""
        yield from _fleet(w)
    yield ""
    yield from _estimates(w)
    for finding in findings(w):
        yield _row("advice", finding.text)


def _here(w: WhatIf) -> Iterator[str]:
    if w.hit_tokens is not None:
        saved = f", {_time(w.hit_tokens, w)} of prefill" if w.prefill_tokens_per_second else ""
        yield _row("this run", f"{_share(w.hit_tokens, w)} found: {w.hit_tokens:,} tokens{saved}")
        yield _row("", f"with {w.blocks:,} blocks{_memory(w.blocks, w)}")
    if w.optimum_hit_tokens is not None:
        best = f"{_share(w.optimum_hit_tokens, w)} at most, whatever is evicted (Belady)"
        yield _row("at this size", best)
    if w.endless_hit_tokens is not None:
        yield _row("endless cache", f"{_share(w.endless_hit_tokens, w)}: {w.endless_hit_tokens:,} tokens")
    yield _row("ceiling", f"{_share(w.ceiling_hit_tokens, w)}: each block is computed once and never again")


def _losses(w: WhatIf) -> Iterator[str]:
    losses = w.losses
    rows = [
        (losses.evictions, "tokens had been evicted"),
        (losses.running_together, "were just being computed by another request"),
        (losses.preemptions or None, "tokens were computed again after preemptions"),
    ]
    name = "lost"
    for tokens, what in rows:
        if tokens:
            time = f" ({_time(tokens, w)})" if w.prefill_tokens_per_second else ""
            yield _row(name, f"{tokens:,} {what}{time}")
            name = ""
    if losses.order and losses.order > 0:
        yield _row(name, f"{losses.order:,} of them would be found in longest-prefix-first order")
        name = ""
    if losses.block_size:
        yield _row(name, f"up to {losses.block_size:,} lie in blocks that agree in part, about half of that is likely")
    longer = ", ".join(
        f"{size:,}: {_share(found, w)}" for size, found in w.longer_blocks.items() if size != w.block_size
    )
    if longer:
        yield _row("longer blocks", f"would find at most {longer}")


def _table(sizes: Sequence[Size], w: WhatIf) -> Iterator[str]:
    if not sizes:
        return
    time = any(size.seconds_saved is not None for size in sizes)
    memory = any(size.bytes is not None for size in sizes)
    head = f"  {'blocks':>9}{'tokens':>12}{'memory':>11}" if memory else f"  {'blocks':>9}{'tokens':>12}"
    yield f"{head}{'found':>10}{'plain LRU':>11}{'preempted':>11}{'saves' if time else '':>10}"
    for size in sizes:
        cells = f"  {size.blocks:>9,}{size.tokens:>12,}"
        if memory:
            cells += f"{of_bytes(size.bytes):>11}"
        exact = " " if size.exact else "~"
        preempted = "-" if size.num_preemptions is None else f"{size.num_preemptions:,}"
        saved = seconds(size.seconds_saved) if size.seconds_saved is not None else ""
        here = "  this run" if size.blocks == w.blocks else ""
        found, lru = _share(size.hit_tokens, w), _share(size.lru_hit_tokens, w)
        yield f"{cells}{exact + found:>10}{lru:>11}{preempted:>11}{saved:>10}{here}".rstrip()


def _fleet(w: WhatIf) -> Iterator[str]:
    yield _row(
        "engines", f"of {w.fleet[0].blocks:,} blocks each, plain LRU; in brackets one engine with the blocks of all"
    )
    for replicas in sorted({size.replicas for size in w.fleet}):
        mine = [size for size in w.fleet if size.replicas == replicas]
        cells = [f"{size.routing} {_share(size.hit_tokens, w)}" for size in mine]
        yield _row(f"{replicas:,}", f"{', '.join(cells)} ({_share(mine[0].one_cache_hit_tokens, w)})")


def _estimates(w: WhatIf) -> Iterator[str]:
    if w.reproduced:
        yield _row("checked", "played again with its own blocks, every request finds what the engine found")
    reasons = list(dict.fromkeys(reason for size in (*w.sizes, *w.reordered) for reason in size.why_estimated))
    general = [reason for reason in reasons if not reason.startswith("requests are preempted")]
    for number, reason in enumerate(general):
        yield _row("~ estimated" if not number else "", reason)
    if len(general) < len(reasons):
        yield _row(
            "" if general else "~ estimated", "requests are preempted: when exactly depends on more than is known"
        )


def _time(tokens: int, w: WhatIf) -> str:
    return seconds(tokens / (w.prefill_tokens_per_second or float("nan")))


def _share(tokens: int, w: WhatIf) -> str:
    return percent(tokens / w.query_tokens if w.query_tokens else None)


def _memory(blocks: int, w: WhatIf) -> str:
    return f", {of_bytes(blocks * w.bytes_per_block)}" if w.bytes_per_block else ""


def _row(name: str, text: str) -> str:
    return f"  {name:<{_WIDTH}}{text}".rstrip()
