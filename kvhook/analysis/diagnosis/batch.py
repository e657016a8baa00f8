"""Rules about the batch: what keeps it from growing, and prefill that holds up decode."""

from __future__ import annotations

from kvhook.analysis.diagnosis import cache
from kvhook.analysis.diagnosis.cache import FEW_STEPS, OFTEN
from kvhook.analysis.diagnosis.finding import INFERRED, Finding, milliseconds, percent
from kvhook.analysis.diagnosis.signs import Signs

#: There is room for more requests if this share of the blocks was not in use.
_ROOM = 0.3
#: A token budget is used up in every prefill of a long prompt: only more steps than these say that it is too small.
_VERY_OFTEN = 0.2
#: A step with prefill holds decode up if it takes so many times as long, and this share of all tokens came in such
#: steps.
_LONGER, _SHARE = 4.0, 0.05
#: So many steps of each kind, or so many latencies.
_FEW, _FEW_VALUES = 5, 20


def limited_by_seats(signs: Signs) -> Finding | None:
    """``max_num_seqs`` holds requests back although the cache has room."""
    core, seats = signs.core, signs.max_num_seqs
    setting = "a larger max_num_seqs"
    if cache.too_small(signs) or cache.preemption_thrash(signs):
        # the advice about these is the opposite, and they cost more
        setting += ", but only with more blocks: with these, more requests would wait for blocks or be preempted"
    of = f"max_num_seqs ({seats})" if seats else "max_num_seqs"
    if core is not None:
        steps, free = core.limited_by.get("max_num_seqs", 0), core.free_when.get("max_num_seqs", 0.0)
        if steps < FEW_STEPS or steps < OFTEN * core.steps or free < _ROOM:
            return None
        text = (
            f"{of} limited the batch in {percent(steps / core.steps)} of the steps: requests waited, while "
            f"{percent(free)} of the KV blocks were not in use."
        )
        evidence = {"steps": steps, "share": steps / core.steps, "free": free}
        return Finding("limited_by_max_num_seqs", text, setting, evidence)
    steps = signs.waiting_with_room.get(seats, 0) if seats else 0
    if steps < FEW_STEPS or steps < OFTEN * signs.known_steps:
        return None
    share = steps / signs.known_steps
    text = (
        f"{of} probably limited the batch: in {percent(share)} of the steps so many requests ran and others waited, "
        "while the KV cache had room."
    )
    return Finding("limited_by_max_num_seqs", text, setting, {"steps": steps, "share": share}, INFERRED)


def limited_by_tokens(signs: Signs) -> Finding | None:
    """The token budget of a step holds prefill back."""
    core, seats = signs.core, signs.max_num_seqs
    setting = "a larger max_num_batched_tokens: more throughput, but decode waits longer for prefill"
    if core is not None:
        steps = core.limited_by.get("token_budget", 0)
        if steps < FEW_STEPS or steps < _VERY_OFTEN * core.steps:
            return None
        share = steps / core.steps
        text = (
            f"The token budget of a step (max_num_batched_tokens) limited the batch in {percent(share)} of the steps."
        )
        return Finding("limited_by_token_budget", text, setting, {"steps": steps, "share": share})
    steps = sum(count for running, count in signs.waiting_with_room.items() if seats and running < seats)
    if steps < FEW_STEPS or steps < _VERY_OFTEN * signs.known_steps:
        return None
    share = steps / signs.known_steps
    text = (
        f"The token budget of a step (max_num_batched_tokens) probably limited the batch: in {percent(share)} of the "
        "steps requests waited, although fewer than max_num_seqs ran and the KV cache had room."
    )
    return Finding("limited_by_token_budget", text, setting, {"steps": steps, "share": share}, INFERRED)


def prefill_holds_up_decode(signs: Signs) -> Finding | None:
    """Requests that decode wait for the prefill of others in the same step."""
    core = signs.core
    setting = "a smaller max_num_batched_tokens or long_prefill_token_threshold"
    if signs.chunked_prefill is False:
        setting = "enable_chunked_prefill=True, with a smaller max_num_batched_tokens"
    if core is not None:
        if min(core.decode_steps, core.mixed_steps) < _FEW or core.mixed_share < _SHARE:
            return None
        if core.mixed_seconds < _LONGER * core.decode_seconds:
            return None
        times = core.mixed_seconds / core.decode_seconds
        text = (
            f"Prefill holds up decode: {percent(core.mixed_share)} of the generated tokens came in steps that also "
            f"prefilled. These took {milliseconds(core.mixed_seconds)} (median), {times:.1f} times as long as steps "
            f"that only decoded ({milliseconds(core.decode_seconds)})."
        )
        evidence = {
            "share": core.mixed_share,
            "mixed_seconds": core.mixed_seconds,
            "decode_seconds": core.decode_seconds,
            "times": times,
        }
        return Finding("prefill_holds_up_decode", text, setting, evidence)
    (beside, beside_sum), (alone, alone_sum) = signs.itl_beside_prefill, signs.itl_alone
    if min(beside, alone) < _FEW_VALUES or beside < _SHARE * (beside + alone):
        return None
    first, second = beside_sum / beside, alone_sum / alone
    if first < _LONGER * second:
        return None
    text = (
        f"Prefill probably holds up decode: in steps that brought first tokens the inter-token latency was "
        f"{milliseconds(first)} on average, {first / second:.1f} times that of other steps ({milliseconds(second)})."
    )
    evidence = {"share": beside / (beside + alone), "mixed_seconds": first, "decode_seconds": second}
    return Finding("prefill_holds_up_decode", text, setting, evidence, INFERRED)
