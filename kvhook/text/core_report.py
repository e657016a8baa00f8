"""A `CoreReport` as a page of text: where hits come from, and what misses, evictions and preemptions cost."""

from __future__ import annotations

import math
from collections.abc import Iterator

from kvhook.analysis.core_report import BlockTimes, CoreReport, Cost
from kvhook.text.numbers import of_bytes, percent, seconds

_WIDTH = 16

#: A value of MISS_REASONS, for people.
_MISSES = {
    "never_seen": "prefix never seen before",
    "diverged": "differs from the cached prefix",
    "evicted": "had been evicted",
    "reset": "the cache had been reset",
    "short": "shorter than a block",
    "salted": "never seen with this cache salt",
    "lora": "never seen with this LoRA adapter",
    "not_looked_up": "not looked up",
    "unknown": "reason not known",
}
#: A value of LIMITS, for people.
LIMITS = {
    "none_waiting": "nobody waited",
    "max_num_seqs": "max_num_seqs",
    "token_budget": "token budget",
    "kv_blocks": "no KV blocks",
    "lora": "max_loras",
    "encoder_budget": "encoder budget",
    "structured_output": "grammars not ready",
    "remote_kv": "KV transfers",
    "long_prefill": "long_prefill_token_threshold",
    "paused": "paused",
    "deferred": "deferred",
    "unknown": "not known",
}


def as_text(r: CoreReport, name: str = "") -> str:
    """The whole page, lines of at most 100 characters."""
    return "\n".join(_lines(r, name))


def _lines(r: CoreReport, name: str) -> Iterator[str]:
    cores = "the engine core" if r.num_cores == 1 else f"{r.num_cores:,} engine cores"
    yield f"{f'{name}: ' if name else ''}{r.num_steps:,} steps of {cores}, {r.num_requests:,} requests ended"
    yield _row("scheduled", f"{r.num_scheduled_tokens:,} tokens: {_split(r)}")
    for text in _again(r):
        yield _row("", text)
    yield _row("limited by", _shares(r))
    yield ""
    yield from _hits(r)
    yield ""
    yield from _evictions(r)
    yield from _preemptions(r)
    yield ""
    yield from _room(r)
    if r.blocks is not None:
        yield ""
        yield from _ledger(r.blocks)
    for failure in r.failures:
        yield _row("ended early", f"kvhook failed in an engine core: {failure}")
    if r.records_lost:
        yield _row("lost", f"{r.records_lost:,} records: the numbers above are too small")


def _split(r: CoreReport) -> str:
    parts = {
        "prefill": r.num_prefill_tokens,
        "decode": r.num_decode_tokens,
        "computed again": r.num_recomputed_tokens,
        "speculative": r.num_spec_tokens,
    }
    return ", ".join(f"{count:,} {what}" for what, count in parts.items() if count)


def _again(r: CoreReport) -> Iterator[str]:
    if r.num_recomputed_tokens:
        share = r.num_recomputed_tokens / r.num_scheduled_tokens
        yield f"{percent(share)} of the work was done twice, for requests that had been preempted"


def _shares(r: CoreReport) -> str:
    ranked = sorted(r.limited_by.items(), key=lambda item: -item[1])
    return ", ".join(f"{LIMITS.get(why, why)} {percent(n / r.num_steps)}" for why, n in ranked[:5])


def _hits(r: CoreReport) -> Iterator[str]:
    if not r.num_lookups:
        yield _row("prefix cache", "nothing was looked up")
    else:
        share = percent(r.num_found_tokens / r.num_lookup_tokens)
        yield _row("prefix cache", f"{share} found: {r.num_found_tokens:,} of {r.num_lookup_tokens:,} tokens")
        if r.num_resumed_lookup_tokens:
            yield _row(
                "",
                f"of preempted requests that came back: {r.num_resumed_found_tokens:,} of "
                f"{r.num_resumed_lookup_tokens:,} tokens",
            )
    for why, missed in r.misses.items():
        text = _MISSES.get(why, why)
        tokens = f", {missed.tokens:,} tokens" if missed.tokens else ""
        yield _row("  not found", f"{text}: {missed.lookups:,} look-ups{tokens}")


def _evictions(r: CoreReport) -> Iterator[str]:
    yield _row("evictions", f"{r.num_evicted_blocks:,} blocks")
    if r.num_lookups_of_evicted:
        when = f"{r.evicted_steps_p50:,.0f} steps ({seconds(r.evicted_seconds_p50)})"
        yield _row("", f"{r.num_lookups_of_evicted:,} look-ups asked for an evicted block, half of them within {when}")
    if r.evictions is not None and r.evictions.blocks:
        share = "" if math.isnan(r.evictions.share) else f" ({percent(r.evictions.share)} of them)"
        yield _row("", f"{r.evictions.blocks:,} evicted blocks{share} were asked for again: evicted too early")
    if r.evictions is not None and r.evictions.again.tokens:
        yield _row("", f"{again(r.evictions.again)} because of it")


def _preemptions(r: CoreReport) -> Iterator[str]:
    if not r.num_preemptions:
        yield _row("preemptions", "none")
        return
    yield _row("preemptions", f"{r.num_preemptions:,}: {r.num_lost_tokens:,} computed tokens thrown away")
    yield _row("", f"{again(r.preemptions)}; requests waited {seconds(r.preempted_seconds)}")


def again(cost: Cost) -> str:
    """What was computed a second time, in words."""
    share = "" if math.isnan(cost.share) else f": {percent(cost.share)} of the work, about {seconds(cost.seconds)}"
    return f"{cost.tokens:,} tokens computed again{share}"


def _room(r: CoreReport) -> Iterator[str]:
    memory = ""
    if r.bytes_per_block:
        memory = f", {of_bytes(r.num_kv_blocks_peak * r.bytes_per_block)}"
    each = " in the core that used most" if r.num_cores > 1 else ""
    if r.num_kv_blocks:
        share = percent(r.num_kv_blocks_peak / r.num_kv_blocks)
        yield _row("KV blocks", f"peak {r.num_kv_blocks_peak:,} of {r.num_kv_blocks:,} ({share}{memory}){each}")
    else:
        yield _row("KV blocks", f"peak {r.num_kv_blocks_peak:,}{each}")
    yield _row(
        "",
        f"not in use, on average: {r.num_kv_blocks_cached_mean:,.1f} cached, {r.num_kv_blocks_empty_mean:,.1f} empty",
    )
    if r.waste is not None and not math.isnan(r.waste):
        yield _row("waste", f"{percent(r.waste)} of the room in used blocks holds no token")


def _ledger(b: BlockTimes) -> Iterator[str]:
    for name, what, values in (
        ("lifetime", "from being cached to being evicted", b.lifetime),
        ("idle", "from the last use to being evicted", b.idle_before_eviction),
        ("reuse distance", "between two uses of the same content", b.steps_between_uses),
    ):
        if not math.isnan(values[0]):
            yield _row(name, f"p50 {values[0]:,.0f}, p90 {values[1]:,.0f}, p99 {values[2]:,.0f} steps {what}")
    if b.reuses:
        used = sum(count for times, count in b.reuses.items() if times)
        total = sum(b.reuses.values())
        yield _row("reused", f"{percent(used / total)} of {total:,} cached blocks were found again")
    if not math.isnan(b.evicted_too_early):
        yield _row("too early", f"{percent(b.evicted_too_early)} of the evicted contents were computed again later")
    for i, prefix in enumerate(b.shared_prefixes):
        text = f"{prefix.num_tokens:,} tokens in {prefix.num_requests:,} requests (digest {prefix.digest:016x})"
        yield _row("" if i else "shared prefixes", text)


def _row(name: str, text: str) -> str:
    return f"  {name:<{_WIDTH}}{text}".rstrip()


def miss_text(why: str) -> str:
    """A value of `MISS_REASONS`, for people."""
    return _MISSES.get(why, why)
