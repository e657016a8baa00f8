"""What to change, in sentences: drawn from a `WhatIf` alone, so that others can show them beside their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from kvhook.whatif.report import ENOUGH, WhatIf

#: What gains less than this share of the looked-up tokens is not worth a sentence.
WORTH = 0.01


class Finding(NamedTuple):
    """One thing to change.

    Attributes:
        code: a name that stays: ``cache_too_small``, ``cache_too_large``, ``order``, ``block_size``, ``preemptions``,
            ``running_together`` or ``cache_large_enough``.
        text: a sentence for people.
        tokens: prompt tokens that would not be computed any more; 0 if it saves none.
        seconds: the same in seconds of prefill; None if not known.
        settings: arguments of ``LLM(...)`` to look at.
    """

    code: str
    text: str
    tokens: int
    seconds: float | None
    settings: tuple[str, ...]


def findings(w: WhatIf) -> list[Finding]:
    """What to change, what gains most first."""
    found = [*_size(w), *_order(w), *_together(w), *_block_size(w), *_preemptions(w)]
    return sorted(found, key=lambda finding: -finding.tokens)


def _make(w: WhatIf, code: str, text: str, tokens: int, *settings: str) -> Finding:
    speed = w.prefill_tokens_per_second
    return Finding(code, text, tokens, tokens / speed if speed else None, settings)


def _worth(w: WhatIf, tokens: int | None) -> bool:
    return tokens is not None and w.query_tokens > 0 and tokens >= WORTH * w.query_tokens


def _size(w: WhatIf) -> Iterator[Finding]:
    enough, share = w.enough, f"{100 * ENOUGH:.0f} %"
    if enough is None:
        return
    is_here = bool(w.blocks)
    need = f"{enough.blocks:,} blocks ({enough.tokens:,} tokens{_memory(enough.bytes)})"
    if not is_here:
        yield _make(w, "cache_size", f"{need} find {share} of what an endless cache finds", 0)
        return
    gain = enough.hit_tokens - (w.hit_tokens if w.hit_tokens is not None else 0)
    if enough.blocks > w.blocks and _worth(w, gain):
        more = enough.blocks - w.blocks
        times = enough.blocks / w.blocks
        how = f"{more:,} more{_more(more, w)}: raise gpu_memory_utilization, or num_gpu_blocks_override where it is set"
        if times <= 2:
            how += '; or kv_cache_dtype="fp8", which makes two blocks of one'
        yield _make(
            w,
            "cache_too_small",
            f"{need} find {share} of what an endless cache finds, {gain:,} tokens more than now. That is {how}",
            gain,
            "gpu_memory_utilization",
            "num_gpu_blocks_override",
            "kv_cache_dtype",
        )
    elif enough.blocks * 2 <= w.blocks and enough.num_preemptions:
        yield _make(
            w,
            "cache_large_enough",
            f"{need} would find as much as the {w.blocks:,} there are, but requests would be preempted "
            f"{enough.num_preemptions:,} times",
            0,
        )
    elif enough.blocks * 2 <= w.blocks:
        yield _make(
            w,
            "cache_too_large",
            f"{need} would do as well as the {w.blocks:,} there are: there is room for a larger model, for longer "
            "requests or for more of them (max_num_seqs)",
            0,
            "max_num_seqs",
            "gpu_memory_utilization",
        )
    else:
        yield _make(w, "cache_large_enough", f"a larger cache gains next to nothing: {need} find {share}", 0)


def _order(w: WhatIf) -> Iterator[Finding]:
    gain = w.losses.order
    if gain is not None and _worth(w, gain):
        yield _make(
            w,
            "order",
            f"sort the prompts so that those with the same beginning follow each other: {gain:,} tokens more are found "
            "at this size (kvhook whatif --reorder)",
            gain,
        )


def _together(w: WhatIf) -> Iterator[Finding]:
    lost = w.losses.running_together
    if lost is not None and _worth(w, lost):
        yield _make(
            w,
            "running_together",
            f"{lost:,} tokens were just being computed by another request: send one request of each group first, or "
            "lower max_num_seqs",
            lost,
            "max_num_seqs",
        )


def _block_size(w: WhatIf) -> Iterator[Finding]:
    likely = w.losses.block_size // 2
    if _worth(w, likely) and w.block_size > 16:
        yield _make(
            w,
            "block_size",
            f"blocks of {w.block_size} tokens are found whole or not at all: a smaller block_size finds some "
            f"{likely:,} tokens more",
            likely,
            "block_size",
        )


def _preemptions(w: WhatIf) -> Iterator[Finding]:
    again = w.losses.preemptions
    if _worth(w, again):
        yield _make(
            w,
            "preemptions",
            f"{again:,} tokens were computed again after preemptions: lower max_num_seqs, or have more blocks",
            again,
            "max_num_seqs",
            "gpu_memory_utilization",
        )


def _memory(number: int | None) -> str:
    if number is None:
        return ""
    return f", {number / 2**30:.3g} GiB" if number >= 2**30 / 10 else f", {number / 2**20:.3g} MiB"


def _more(blocks: int, w: WhatIf) -> str:
    if not w.bytes_per_block:
        return ""
    more, share = blocks * w.bytes_per_block, blocks * w.bytes_per_block / (80 * 2**30)
    return _memory(more) + (f" ({share:.1%} of a GPU with 80 GiB)" if share >= 0.001 else "")
