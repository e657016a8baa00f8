"""Rules about the prefix cache: useless, off, missed by too large blocks, never asked, hits of one kind only, and an
order of requests that spoils sharing."""

from __future__ import annotations

from kvhook.analysis.diagnosis.cache import EVICTED, FEW_LOOKUPS
from kvhook.analysis.diagnosis.finding import INFERRED, Finding, percent
from kvhook.analysis.diagnosis.signs import Signs

#: So many requests say what a workload is like.
_MANY = 20
#: A hit rate below this is none; what is shared counts from this part of the prompts on.
_NONE, _PART = 0.01, 0.1
#: Most: of look-ups that share less than a block, of hits that come from siblings.
_HALF, _NEARLY_ALL = 0.5, 0.9


def useless(signs: Signs) -> Finding | None:
    """Prefix caching is on and finds nothing, because there is nothing to be found."""
    s, core = signs.summary, signs.core
    queries, hits = s.prefix_cache_queries or 0, s.prefix_cache_hits or 0
    requests = core.first_lookups if core is not None else s.num_finished_reqs or 0
    if s.prefix_caching is not True or requests < _MANY or not queries or hits >= _NONE * queries:
        return None
    if below_a_block(signs) or never_looked_up(signs) or (core is not None and core.evicted_tokens >= _NONE * queries):
        return None  # there would be something
    evidence = {"requests": requests, "queries": queries, "hits": hits}
    nothing = "nothing" if not hits else f"{percent(hits / queries)}"
    text = f"Prefix caching finds {nothing}: {requests:,} requests looked up {queries:,} tokens"
    setting = "prompts that begin alike share: what is common first; else enable_prefix_caching=False saves the hashing"
    if core is None or core.shared_tokens < 0:
        return Finding("prefix_cache_useless", f"{text}.", setting, evidence, INFERRED)
    evidence["shared_tokens"] = core.shared_tokens
    text += f", and neighbours share {core.shared_tokens / requests:.1f} tokens at their beginnings on average."
    return Finding("prefix_cache_useless", text, setting, evidence)


def off(signs: Signs) -> Finding | None:
    """Prefix caching is off although prompts begin alike."""
    s, core = signs.summary, signs.core
    if s.prefix_caching is not False:
        return None
    if core is not None:
        return _off_recorded(signs)
    prompt = s.num_prompt_tokens or 0
    if signs.samples < FEW_LOOKUPS or not prompt or signs.sample_tokens < _PART * prompt:
        return None
    text = (
        f"Prefix caching is off, and would probably help: {signs.samples:,} requests are further samples of a prompt, "
        f"and {percent(signs.sample_tokens / prompt)} of the prompt tokens are theirs."
    )
    evidence = {"samples": signs.samples, "sample_tokens": signs.sample_tokens, "prompt_tokens": prompt}
    return Finding("prefix_cache_off", text, "enable_prefix_caching=True", evidence, INFERRED)


def _off_recorded(signs: Signs) -> Finding | None:
    """The engine core compares the beginnings of prompts also where nothing is looked up."""
    core = signs.core
    assert core is not None
    if core.unasked < FEW_LOOKUPS or core.unasked_whole_blocks < _PART * max(core.unasked_tokens, 1):
        return None
    share = core.unasked_whole_blocks / core.unasked_tokens
    text = (
        f"Prefix caching is off, and would help: {percent(share)} of the prompt tokens ({core.unasked_whole_blocks:,}) "
        "are in whole blocks that a prompt just before began with as well."
    )
    evidence = {"requests": core.unasked, "tokens": core.unasked_whole_blocks, "share": share}
    return Finding("prefix_cache_off", text, "enable_prefix_caching=True", evidence)


def below_a_block(signs: Signs) -> Finding | None:
    """Beginnings are shared, but they are shorter than a block; or whole prompts are."""
    core = signs.core
    if core is None or core.first_lookups < FEW_LOOKUPS:
        return None
    size, requests = signs.account.block_size, core.first_lookups
    if not size:
        return None  # the cores have blocks of different sizes
    if core.short >= _HALF * requests:
        text = (
            f"{core.short:,} of {requests:,} prompts are shorter than a block of {size} tokens: nothing of them is "
            "ever found."
        )
        whole = {"lookups": core.short, "of": requests, "block_size": size}
        return Finding("shared_beginning_below_block", text, f"a smaller block_size than {size}", whole)
    if core.below_block < _HALF * requests:
        return None
    mean = core.below_block_tokens / core.below_block
    text = (
        f"Prompts begin alike, but for less than a block: {core.below_block:,} of {requests:,} prompts share "
        f"{mean:.0f} tokens on average with one just before, and only whole blocks of {size} are found."
    )
    evidence = {"lookups": core.below_block, "of": requests, "shared_tokens_mean": mean, "block_size": size}
    setting = f"a smaller block_size than {size}, or a longer common beginning"
    return Finding("shared_beginning_below_block", text, setting, evidence)


def never_looked_up(signs: Signs) -> Finding | None:
    """Prompts pass the prefix cache by."""
    s, core = signs.summary, signs.core
    if s.prefix_caching is False:
        return None
    setting = (
        "requests with prompt_logprobs, and some pooling tasks, are not looked up: leave it out where it is not used"
    )
    if core is not None:
        missed = core.unasked
        if missed < FEW_LOOKUPS or missed < _PART * (missed + core.first_lookups):
            return None
        text = f"{missed:,} of {missed + core.first_lookups:,} prompts were never looked up in the prefix cache."
        evidence = {"prompts": missed, "of": missed + core.first_lookups}
        return Finding("never_looked_up", text, setting, evidence)
    never = s.never_looked_up
    if never is None or never.tokens < _PART * max(never.of, 1):
        return None
    least = "" if never.exact else "at least "
    text = f"{least}{never.tokens:,} of {never.of:,} prompt tokens were never looked up in the prefix cache."
    evidence = {"tokens": never.tokens, "of": never.of}
    return Finding("never_looked_up", text[0].upper() + text[1:], setting, evidence, INFERRED)


def only_siblings(signs: Signs) -> Finding | None:
    """All hits are those of samples of one prompt among each other."""
    hits = signs.summary.sibling_hits
    if hits is None or hits.prompts < FEW_LOOKUPS or not hits.siblings:
        return None
    share = hits.siblings / (hits.siblings + hits.others)
    if share < _NEARLY_ALL:
        return None
    text = (
        f"The hits say nothing about sharing between prompts: {percent(share)} of them ({hits.siblings:,} tokens) are "
        f"those of samples of one prompt (n > 1) among each other; {hits.others:,} tokens come from other prompts."
    )
    setting = "n of SamplingParams makes these hits; between prompts only a common beginning does"
    evidence = {"prompts": hits.prompts, "sibling_tokens": hits.siblings, "other_tokens": hits.others, "share": share}
    return Finding("hits_only_from_siblings", text, setting, evidence, INFERRED)


def order(signs: Signs) -> Finding | None:
    """Requests that waited while what they needed was still cached: in another order they would have found it."""
    core = signs.core
    if core is None or core.waited_evicted < FEW_LOOKUPS:
        return None
    r = signs.account
    share = core.waited_evicted_tokens / max(r.num_lookup_tokens, 1)
    if share < EVICTED:
        return None
    now = r.num_found_tokens / r.num_lookup_tokens
    text = (
        f"The order of requests spoils sharing: {core.waited_evicted:,} requests already waited when what they needed "
        f"was evicted. With those that share next to each other up to {core.waited_evicted_tokens:,} more tokens would "
        f"have been found, for a hit rate of up to {percent(min(now + share, 1.0))} instead of {percent(now)}."
    )
    evidence = {
        "requests": core.waited_evicted,
        "tokens": core.waited_evicted_tokens,
        "hit_rate": now,
        "hit_rate_at_most": min(now + share, 1.0),
    }
    return Finding(
        "order_spoils_sharing", text, "sort the prompts so that common beginnings come one after the other", evidence
    )
