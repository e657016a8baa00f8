"""Rules about the batch: what keeps it from growing, and prefill that holds up decode."""

from __future__ import annotations

from typing import NamedTuple

from kvhook.analysis.diagnosis import cache
from kvhook.analysis.diagnosis.cache import FEW_STEPS, OFTEN
from kvhook.analysis.diagnosis.finding import INFERRED, RECORDED, Finding, milliseconds, percent
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


class _Limit(NamedTuple):
    """In how many steps something kept requests waiting, of how many."""

    steps: int
    of: int
    basis: str

    @property
    def evidence(self) -> dict[str, float]:
        return {"steps": self.steps, "share": self.steps / self.of}

    def is_often(self, share: float) -> bool:
        """Whether it was in so many of the steps, and not only in a few."""
        return self.steps >= FEW_STEPS and self.steps >= share * self.of


def _limit(signs: Signs, why: str, inferred: int) -> _Limit:
    """What the engine core says of a limit; without its account the steps that look like it."""
    if signs.core is None:
        return _Limit(inferred, signs.known_steps, INFERRED)
    return _Limit(signs.core.limited_by.get(why, 0), signs.core.steps, RECORDED)


def limited_by_seats(signs: Signs) -> Finding | None:
    """``max_num_seqs`` holds requests back although the cache has room."""
    core, seats = signs.core, signs.max_num_seqs
    limit = _limit(signs, "max_num_seqs", signs.waiting_with_room.get(seats, 0) if seats else 0)
    free = core.free_when.get("max_num_seqs", 0.0) if core is not None else None
    if not limit.is_often(OFTEN) or (free is not None and free < _ROOM):
        return None
    setting = "a larger max_num_seqs"
    if cache.too_small(signs) or cache.preemption_thrash(signs):
        # the advice about these is the opposite, and they cost more
        setting += ", but only with more blocks: with these, more requests would wait for blocks or be preempted"
    of, share = f"max_num_seqs ({seats})" if seats else "max_num_seqs", percent(limit.steps / limit.of)
    if free is None:
        text = (
            f"{of} probably limited the batch: in {share} of the steps so many requests ran and others waited, while "
            "the KV cache had room."
        )
        return Finding("limited_by_max_num_seqs", text, setting, limit.evidence, limit.basis)
    text = (
        f"{of} limited the batch in {share} of the steps: requests waited, while {percent(free)} of the KV blocks were "
        "not in use."
    )
    return Finding("limited_by_max_num_seqs", text, setting, limit.evidence | {"free": free})


def limited_by_tokens(signs: Signs) -> Finding | None:
    """The token budget of a step holds prefill back."""
    seats = signs.max_num_seqs
    inferred = sum(count for running, count in signs.waiting_with_room.items() if seats and running < seats)
    limit = _limit(signs, "token_budget", inferred)
    if not limit.is_often(_VERY_OFTEN):
        return None
    budget, share = "The token budget of a step (max_num_batched_tokens)", percent(limit.steps / limit.of)
    text = f"{budget} limited the batch in {share} of the steps."
    if limit.basis == INFERRED:
        text = (
            f"{budget} probably limited the batch: in {share} of the steps requests waited, although fewer than "
            "max_num_seqs ran and the KV cache had room."
        )
    setting = "a larger max_num_batched_tokens: more throughput, but decode waits longer for prefill"
    return Finding("limited_by_token_budget", text, setting, limit.evidence, limit.basis)


class _Decode(NamedTuple):
    """Tokens that were generated beside prefill, and the others."""

    #: how many steps, or latencies, there are of each
    beside: int
    alone: int
    #: the share of the tokens that came beside prefill
    share: float
    #: what one of each took
    mixed_seconds: float
    decode_seconds: float

    @property
    def evidence(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in ("share", "mixed_seconds", "decode_seconds")}


def prefill_holds_up_decode(signs: Signs) -> Finding | None:
    """Requests that decode wait for the prefill of others in the same step."""
    core, name = signs.core, "prefill_holds_up_decode"
    if core is not None:
        found = _Decode(core.mixed_steps, core.decode_steps, core.mixed_share, core.mixed_seconds, core.decode_seconds)
    else:
        (beside, beside_sum), (alone, alone_sum) = signs.itl_beside_prefill, signs.itl_alone
        if not beside or not alone:
            return None
        found = _Decode(beside, alone, beside / (beside + alone), beside_sum / beside, alone_sum / alone)
    if min(found.beside, found.alone) < (_FEW_VALUES if core is None else _FEW) or found.share < _SHARE:
        return None
    if not found.decode_seconds or found.mixed_seconds < _LONGER * found.decode_seconds:
        return None
    setting = "a smaller max_num_batched_tokens or long_prefill_token_threshold"
    if signs.chunked_prefill is False:
        setting = "enable_chunked_prefill=True, with a smaller max_num_batched_tokens"
    times = found.mixed_seconds / found.decode_seconds
    mixed, plain = milliseconds(found.mixed_seconds), milliseconds(found.decode_seconds)
    if core is None:
        text = (
            "Prefill probably holds up decode: in steps that brought first tokens the inter-token latency was "
            f"{mixed} on average, {times:.1f} times that of other steps ({plain})."
        )
        return Finding(name, text, setting, found.evidence, INFERRED)
    text = (
        f"Prefill holds up decode: {percent(found.share)} of the generated tokens came in steps that also prefilled. "
        f"These took {mixed} (median), {times:.1f} times as long as steps that only decoded ({plain})."
    )
    return Finding(name, text, setting, found.evidence | {"times": times})
