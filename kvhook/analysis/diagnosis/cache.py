"""Rules about the size of the KV cache: too small, or mostly empty; and what too few blocks cost."""

from __future__ import annotations

from kvhook.analysis.diagnosis.finding import INFERRED, Finding, percent
from kvhook.analysis.diagnosis.signs import Signs

#: A limit counts if it held so many steps back, and this share of all steps.
FEW_STEPS, OFTEN = 10, 0.1
#: Preemptions count from so many on; work done twice from this share of all work on.
FEW_PREEMPTIONS, DONE_TWICE = 3, 0.03
#: Without the engine core's account: preemptions by finished requests.
_PER_REQUEST = 0.1
#: Blocks that evictions took too early count from this share of the tokens that were looked up, in so many look-ups.
EVICTED, FEW_LOOKUPS = 0.05, 5
#: A cache of which less than this was ever in use is mostly empty, if a run of so many steps has so many blocks.
_EMPTY, _LONG, _MANY_BLOCKS = 0.2, 100, 100

MORE_BLOCKS = (
    "more blocks: gpu_memory_utilization (or num_gpu_blocks_override); smaller ones: kv_cache_dtype='fp8'; fewer "
    "requests at a time: max_num_seqs"
)


def too_small(signs: Signs) -> Finding | None:
    """KV blocks run out while requests wait."""
    s, core = signs.summary, signs.core
    if core is not None:
        steps, of = core.limited_by.get("kv_blocks", 0), core.steps
    else:
        steps, of = signs.full_and_waiting, signs.known_steps
    if steps < FEW_STEPS or steps < OFTEN * of:
        return None
    evidence = {"steps": steps, "share": steps / of}
    if (peak := s.kv_cache_usage_peak_in_step or s.kv_cache_usage_peak) is not None:
        evidence["kv_cache_usage_peak"] = peak
    preempted = signs.account.num_preemptions if core is not None else s.num_preempted_reqs or 0
    evidence["preemptions"] = preempted
    more = f", and {preempted:,} times one was preempted" if preempted else ""
    if core is not None:
        text = (
            f"The KV cache is too small: in {percent(steps / of)} of the steps a request had to wait for blocks{more}."
        )
        return Finding("cache_too_small", text, MORE_BLOCKS, evidence)
    text = (
        f"The KV cache is probably too small: in {percent(steps / of)} of the steps requests waited while it was "
        f"nearly full{more}."
    )
    return Finding("cache_too_small", text, MORE_BLOCKS, evidence, INFERRED)


def preemption_thrash(signs: Signs) -> Finding | None:
    """Preemptions throw work away that is done again."""
    core, s = signs.core, signs.summary
    setting = "fewer requests at a time: max_num_seqs; or more blocks: gpu_memory_utilization"
    if core is None:
        preempted, finished = s.num_preempted_reqs or 0, s.num_finished_reqs or 0
        if preempted < FEW_PREEMPTIONS or preempted < _PER_REQUEST * max(finished, 1):
            return None
        text = (
            f"Requests were preempted {preempted:,} times ({finished:,} finished). What they had in the cache is "
            "computed again, or found again if nobody took the blocks."
        )
        few = {"preemptions": preempted, "finished": finished}
        return Finding("preemption_thrash", text, setting, few, INFERRED)
    r = signs.account
    if r.num_preemptions < FEW_PREEMPTIONS or r.num_recomputed_tokens < DONE_TWICE * max(r.num_scheduled_tokens, 1):
        return None
    share = r.num_recomputed_tokens / r.num_scheduled_tokens
    text = (
        f"{percent(share)} of the work was done twice: {r.num_preemptions:,} preemptions threw {r.num_lost_tokens:,} "
        f"computed tokens away, and {r.num_recomputed_tokens:,} were computed again."
    )
    evidence: dict[str, float] = {
        "preemptions": r.num_preemptions,
        "lost_tokens": r.num_lost_tokens,
        "recomputed_tokens": r.num_recomputed_tokens,
        "share": share,
        "seconds_preempted": r.preempted_seconds,
    }
    return Finding("preemption_thrash", text, setting, evidence)


def evicted_too_early(signs: Signs) -> Finding | None:
    """Content is evicted, and asked for again."""
    core = signs.core
    if core is None or core.evicted < FEW_LOOKUPS:
        return None
    looked_up = max(signs.account.num_lookup_tokens, 1)
    share = core.evicted_tokens / looked_up
    if share < EVICTED:
        return None
    r = signs.account
    again = (
        f", half of them within {r.evicted_steps_p50:,.0f} steps" if r.evicted_steps_p50 == r.evicted_steps_p50 else ""
    )
    text = (
        f"Blocks were evicted too early: {core.evicted:,} look-ups asked for evicted content again{again}, and "
        f"missed {core.evicted_tokens:,} tokens, {percent(share)} of all that were looked up."
    )
    evidence = {"lookups": core.evicted, "tokens": core.evicted_tokens, "share": share}
    return Finding("evicted_too_early", text, MORE_BLOCKS, evidence)


def mostly_empty(signs: Signs) -> Finding | None:
    """Most of the cache never held anything."""
    s, core = signs.summary, signs.core
    blocks = s.num_kv_blocks or 0
    if core is not None:
        touched, basis = core.touched, "recorded"
        blocks = blocks or signs.account.num_kv_blocks
    elif s.prefix_caching is False and s.kv_cache_usage_peak is not None:
        touched, basis = s.kv_cache_usage_peak_in_step or s.kv_cache_usage_peak, INFERRED
    else:
        return None  # cached content may fill what is not in use
    if s.steps < _LONG or blocks < _MANY_BLOCKS or touched >= _EMPTY:
        return None
    text = f"The KV cache is mostly empty: never more than {percent(touched)} of its {blocks:,} blocks held anything."
    setting = "less memory: gpu_memory_utilization; or more requests at a time: max_num_seqs"
    return Finding("cache_mostly_empty", text, setting, {"share": touched, "blocks": blocks}, basis)
