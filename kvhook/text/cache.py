"""The lines of a summary about the KV cache and what was found in it. Most appear only if there is something to say."""

from __future__ import annotations

from collections.abc import Iterator

from kvhook.analysis.lookups import AGAIN_AND_READMITTED, how_counted
from kvhook.analysis.summary import Summary
from kvhook.text.core_report import again
from kvhook.text.numbers import count, percent

#: A name, "" for a line that goes on with the one before, and a text.
Line = tuple[str, str]

#: Engines that are listed.
MOST_ENGINES = 8


def cache_lines(s: Summary) -> Iterator[Line]:
    """Usage, each engine's part, and the caches that requests were looked up in."""
    size = _size(s)
    beside = size if (s.num_kv_cache_groups or 1) < 2 else ""
    yield "KV cache", _usage(s, f" of {beside}" if beside else "")
    if size and not beside:
        yield "", size
    yield from _engines(s)
    yield "prefix cache", _prefix(s)
    yield from _more_on_look_ups(s)
    if s.connector_prefix_cache_queries:
        found = f"{count(s.connector_prefix_cache_hits)} of {s.connector_prefix_cache_queries:,} tokens"
        yield "KV connector", f"hit rate {percent(s.connector_prefix_cache_hit_rate)}: {found}"
        if s.combined_prefix_cache_hit_rate is not None:
            together = (s.prefix_cache_hits or 0) + (s.connector_prefix_cache_hits or 0)
            yield (
                "",
                f"with the prefix cache {percent(s.combined_prefix_cache_hit_rate)}: {together:,} of "
                f"{count(s.prefix_cache_queries)} tokens",
            )
    if s.mm_cache_queries:
        items = f"{count(s.mm_cache_hits)} of {s.mm_cache_queries:,} items"
        yield "multi-modal", f"hit rate {percent(s.mm_cache_hit_rate)} of the processor cache: {items}"


#: Labels and adapters that are listed.
MOST_GROUPS = 8


def group_lines(s: Summary) -> Iterator[Line]:
    """The hit rates of requests by their labels and by their LoRA adapters."""
    for title, groups, none in (("labels", s.by_label, "without a label"), ("LoRA", s.by_lora_name, "no adapter")):
        for i, group in enumerate(groups[:MOST_GROUPS]):
            found = f"{count(group.num_cached_tokens)} of {group.num_prompt_tokens:,} prompt tokens cached"
            known = "cached tokens not known" if group.num_cached_tokens is None else found
            number = f"{group.requests:,} request{'s' * (group.requests != 1)}"
            yield title * (not i), f"{group.name or none}: {percent(group.hit_rate)}, {known}, {number}"
        if len(groups) > MOST_GROUPS:
            yield "", f"and {len(groups) - MOST_GROUPS} more"
    if s.by_prompt is not None:
        prompts, samples, low, middle, high, _ = s.by_prompt
        number = f"{prompts:,} prompt{'s' * (prompts != 1)} with {samples:,} samples"
        if low is None or low == high:
            yield "n > 1", f"{number}: hit rate {percent(low)}"
        else:
            yield "n > 1", f"{number}: hit rate {percent(low)} to {percent(high)}, median {percent(middle)}"


def _usage(s: Summary, size: str) -> str:
    if s.kv_cache_usage_peak is None:
        reason = s.not_recorded.get("kv_cache_usage_peak") or s.absent.get("kv_cache_usage", "no step brought stats")
        return f"not known: {reason}"
    inside = s.kv_cache_usage_peak_in_step
    if inside is not None and inside > 0 == s.kv_cache_usage_peak:
        return f"peak {percent(inside)} inside a step, 0.0 % at the end of each{size}"
    # both are shares of the same blocks, but vLLM's own is rounded in another way
    is_higher = inside is not None and percent(inside) != percent(s.kv_cache_usage_peak)
    higher = f" ({percent(inside)} inside a step)" if is_higher else ""
    return (
        f"peak {percent(s.kv_cache_usage_peak)}{higher}, p95 {percent(s.kv_cache_usage_p95)}, "
        f"mean {percent(s.kv_cache_usage_mean)}{size}"
    )


def _size(s: Summary) -> str:
    """How large the cache is; of several groups of layers the tokens as vLLM tells them."""
    sizes = {life.num_kv_blocks for life in s.engine_lives if life.num_kv_blocks}
    if len(s.engine_lives) > 1 and len(sizes) > 1:
        return ""  # the lines of the engines say it
    blocks = s.num_kv_blocks if len(s.engine_lives) < 2 else next(iter(sizes), None)
    if not blocks:
        return ""
    each = " in each engine" if len(s.engine_lives) > 1 else ""
    if (s.num_kv_cache_groups or 1) > 1:
        fit = f", {s.kv_cache_size_tokens:,} tokens" if s.kv_cache_size_tokens else ""
        return f"{blocks:,} blocks shared by {s.num_kv_cache_groups} groups{fit}{each}"
    return f"{blocks:,} blocks{f' of {s.block_size} tokens' if s.block_size else ''}{each}"


def _engines(s: Summary) -> Iterator[Line]:
    """Engines that lived one after the other, or at the same time."""
    if len(s.engine_lives) < 2:
        return
    together = [life for life in s.engine_lives if life.overlaps]
    if not together:
        yield "engines", f"{len(s.engine_lives)}, one after the other: their blocks do not add up"
    else:
        part = "" if len(together) == len(s.engine_lives) else f"{len(together)} of "
        most = f": {s.num_kv_blocks:,} blocks at one time" if s.num_kv_blocks else ""
        yield "engines", f"{part}{len(s.engine_lives)} at the same time{most}"
    for life in s.engine_lives[:MOST_ENGINES]:
        blocks = f", {life.num_kv_blocks:,} blocks" if life.num_kv_blocks else ""
        # a peak that could not be seen in the whole run is not known of its parts either
        seen = None if s.kv_cache_usage_peak is None else life.kv_cache_usage_peak
        peak = f", peak {percent(seen)}" if seen is not None else ""
        queue = "" if life.num_running_reqs_peak is None else f", running at most {life.num_running_reqs_peak:,}"
        if life.num_waiting_reqs_peak:
            queue += f", waiting at most {life.num_waiting_reqs_peak:,}"
        yield "", f"engine {life.engine}: {life.steps:,} steps{blocks}{peak}{queue}"
    if len(s.engine_lives) > MOST_ENGINES:
        yield "", f"and {len(s.engine_lives) - MOST_ENGINES} more"


def _prefix(s: Summary) -> str:
    if s.prefix_caching is False:
        return "off (enable_prefix_caching=False): no hit rate"
    if s.prefix_cache_queries is None and s.prefix_cache_hit_rate is None:
        return f"not known: {s.absent.get('prefix_cache_queries', 'no reason given')}"
    if s.prefix_cache_hit_rate is None:
        return "no look-ups yet"
    if s.prefix_cache_hits is None:
        return (
            f"hit rate {percent(s.prefix_cache_hit_rate)} of these requests: {count(s.num_prompt_tokens_cached)} of "
            f"{count(s.num_prompt_tokens)} prompt tokens cached"
        )
    of = "part" if s.part else "run"
    found = f"{s.prefix_cache_hits:,} of {s.prefix_cache_queries:,} tokens"
    return f"hit rate {percent(s.prefix_cache_hit_rate)} of this {of}: {found}"


def _more_on_look_ups(s: Summary) -> Iterator[Line]:
    if s.prefix_cache_preempted_queries:
        yield (
            "",
            f"re-admitted requests: {s.prefix_cache_preempted_hits:,} of {s.prefix_cache_preempted_queries:,} tokens "
            f"hit, {percent(s.preempted_share_of_hits)} of all hits",
        )
    if s.sibling_hits and s.sibling_hits.siblings:
        yield (
            "",
            f"{s.sibling_hits.siblings:,} cached tokens come from samples of the same prompt, "
            f"{s.sibling_hits.others:,} from other prompts",
        )
    if (never := s.never_looked_up) is not None:
        tokens = f"{never.tokens:,} of {never.of:,} prompt tokens were never looked up"
        yield "", tokens if never.exact else f"at least {tokens}"
    if s.prefix_cache_repeated_queries:
        also = " or is re-admitted" if how_counted(s.vllm) == AGAIN_AND_READMITTED else ""
        yield (
            "",
            f"at least {s.prefix_cache_repeated_queries:,} tokens were looked up again: this vLLM does so in each step",
        )
        yield "", f"in which a request waits{also}, and the hit rate is of all look-ups"
    if s.core is not None and s.core.evictions is not None and s.core.evictions.again.tokens:
        yield "", f"evicted too early: {again(s.core.evictions.again)}"
    elif s.core is not None and (evicted := s.core.misses.get("evicted")):
        yield "", f"{evicted.lookups:,} look-ups missed {evicted.tokens:,} tokens, because blocks had been evicted"
    if s.prefix_cache_resets:
        yield "", f"reset {s.prefix_cache_resets:,} times" if s.prefix_cache_resets > 1 else "reset once"
    if s.missed_by_vllm and s.missed_by_vllm.queries:
        yield "", f"vLLM's own counters missed {s.missed_by_vllm.queries:,} look-ups, {s.missed_by_vllm.hits:,} hits"
