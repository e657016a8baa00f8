"""Why a batch did not grow: what stood in the way of one more request, or one more token, in a step."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

from kvhook.core_schema import LIMITS

if TYPE_CHECKING:
    from kvhook.adapters.core import Core
    from kvhook.core.lookups import Lookups

_CODE = {name: code for code, name in enumerate(LIMITS)}
#: Of the requests that wait, so many are looked at to find what they wait for.
_LOOK_AT = 8
#: Status of a waiting request -> what it waits for. The others could be scheduled.
_STATUS = {
    "WAITING_FOR_FSM": "structured_output",
    "WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR": "structured_output",
    "WAITING_FOR_REMOTE_KVS": "remote_kv",
    "WAITING_FOR_STREAMING_REQ": "deferred",
}


def limited_by(
    core: Core,
    lookups: Lookups,
    *,
    running: int,
    scheduled: int,
    total: int,
    budget: int,
    waiting: int,
    cut: int,
    preempted: int,
    stalled: Any,
) -> int:
    """A code of `LIMITS`, right after ``schedule``.

    Args:
        running: requests that run.
        scheduled: requests that got tokens.
        total: tokens that were scheduled.
        budget: the most that could have been.
        waiting: requests that wait.
        cut: requests whose prefill goes on in a later step.
        preempted: requests that were preempted in this step; vLLM then admits nobody.
        stalled: a running request in its prefill that got no tokens, or None.
    """
    if preempted:
        return _CODE["kv_blocks"]
    if total >= budget:
        more = waiting or cut or scheduled < running
        return _CODE["token_budget" if more else "none_waiting"]
    if not waiting:
        if stalled is not None:
            return _CODE["encoder_budget" if _has_encoder_inputs(stalled) else "deferred"]
        return _CODE["long_prefill" if cut else "none_waiting"]
    if running >= core.reads["places"]():
        return _CODE["max_num_seqs"]
    if lookups.refused:
        return _CODE["kv_blocks"]
    if "paused" in core.reads and core.reads["paused"]():
        return _CODE["paused"]
    return _CODE[_of_those_that_wait(core, lookups, budget - total)]


def _of_those_that_wait(core: Core, lookups: Lookups, left: int) -> str:
    """There was a place and a budget, and no look-up failed for want of blocks: what does the first one wait for?"""
    attempted = lookups.attempted
    waits = [request for queue in core.reads["queues"]() for request in islice(queue, _LOOK_AT)]
    if attempted is not None and any(request is attempted for request in waits):
        return _stopped(core, attempted, left)
    for request in waits:
        status = _STATUS.get(request.status.name)
        if status:
            return status
        if core.facts["lora"] and getattr(request, "lora_request", None) is not None:
            return "lora"
    return "deferred" if waits else "unknown"


def _has_encoder_inputs(request: Any) -> bool:
    return bool(getattr(request, "has_encoder_inputs", False) or getattr(request, "mm_inputs", None))


def _stopped(core: Core, request: Any, left: int) -> str:
    """The request was looked up, and then not even asked for blocks."""
    if _has_encoder_inputs(request):
        return "encoder_budget"
    if not core.facts["enable_chunked_prefill"] and request.num_tokens > left:
        return "token_budget"
    if core.facts.get("room_is_asked_first"):
        return "kv_blocks"
    return "deferred"
