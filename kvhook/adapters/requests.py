"""What is known of a request that vLLM's stats leave out: one that is aborted, and which sample of its prompt it is.

vLLM makes no finished stats for an aborted request (`OutputProcessor.abort_requests`, every release). What the front
end knows of it at that moment becomes an `AbortedRequest`, with the columns of `kvhook.schema.REQUEST_FIELDS`.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from kvhook.adapters.columns import number
from kvhook.adapters.ids import id_number
from kvhook.adapters.table import read_path
from kvhook.schema import FINISH_REASONS

_NAN = float("nan")

#: What is noted of a request when it is added, as attributes of its ``RequestState`` that begin with ``kvhook_``.
NOTED = ("prompt_number", "label", "lora_name")


class AbortedRequest(NamedTuple):
    """One row of `requests()` for a request that was aborted. Times are in seconds; what is not known is -1 or NaN."""

    request_id: int = -1
    sample_index: int = -1
    prompt_number: int = -1
    label: int = -1
    lora_name: int = -1
    finish_reason: int = FINISH_REASONS.index("abort")
    num_prompt_tokens: int = -1
    num_generation_tokens: int = -1
    num_cached_tokens: int = -1
    num_preemptions: int = -1
    max_tokens: int = -1
    queued_time: float = _NAN
    prefill_time: float = _NAN
    decode_time: float = _NAN
    inference_time: float = _NAN
    e2e_latency: float = _NAN
    time_to_first_token: float = _NAN
    mean_time_per_output_token: float = _NAN


def aborted_v1(state: Any) -> AbortedRequest:
    """What V1's front end knows of a request: its ``RequestState``. The intervals are vLLM's own definitions, those of
    ``IterationStats.update_from_finished_request``."""
    stats = getattr(state, "stats", None)
    queued, scheduled, first, last = (
        getattr(stats, name, 0.0) for name in ("queued_ts", "scheduled_ts", "first_token_ts", "last_token_ts")
    )
    arrival = getattr(stats, "arrival_time", 0.0)
    return AbortedRequest(
        request_id=request_id_of(state),
        sample_index=sample_index_of(state),
        **{name: getattr(state, f"kvhook_{name}", -1) for name in NOTED},
        num_prompt_tokens=_count(state, "prompt_len"),
        num_generation_tokens=_count(stats, "num_generation_tokens"),
        num_cached_tokens=_count(state, "num_cached_tokens") if first else -1,
        num_preemptions=_count(stats, "num_preemptions"),
        max_tokens=number(getattr(state, "max_tokens_param", None)),
        queued_time=_between(queued, scheduled),
        prefill_time=_between(scheduled, first),
        decode_time=_between(first, last),
        inference_time=_between(scheduled, last),
        e2e_latency=time.time() - arrival if arrival else _NAN,
        time_to_first_token=getattr(stats, "first_token_latency", 0.0) or _NAN,
    )


def aborted_v0(group: Any) -> AbortedRequest:
    """What V0's engine knows of a request: its ``SequenceGroup``."""
    sequences: list[Any] = getattr(group, "get_seqs", list)()
    arrival = read_path(group, "metrics.arrival_time") or 0.0
    first = read_path(group, "metrics.first_token_time") or 0.0
    return AbortedRequest(
        request_id=id_number(getattr(group, "request_id", None)),
        num_prompt_tokens=sequences[0].get_prompt_len() if sequences else -1,
        num_generation_tokens=sum(s.get_output_len() for s in sequences) if sequences else -1,
        max_tokens=number(read_path(group, "sampling_params.max_tokens")),
        e2e_latency=time.time() - arrival if arrival else _NAN,
        time_to_first_token=_between(arrival, first),
    )


def request_id_of(state: Any) -> int:
    """The id that the user gave or that ``LLM`` counted, as a number: see `kvhook.adapters.ids`. Samples of a prompt
    share it."""
    return id_number(users_id_of(state))


def users_id_of(state: Any) -> Any:
    """The id that the user gave, or that ``LLM`` counted, as it is.

    From 0.14 a request has an id of its own inside vLLM (``external_req_id`` is the user's). Before, a sample's id is
    ``{index}_{id of its parent}``.
    """
    external = getattr(state, "external_req_id", None)
    if external is None:
        parent = getattr(state, "parent_req", None)
        external = getattr(parent, "request_id", None) or getattr(state, "request_id", None)
    return external


def lora_name_of(state: Any) -> str:
    """The name of a request's LoRA adapter; "" if it has none."""
    return getattr(state, "lora_name", None) or ""


def sample_index_of(state: Any) -> int:
    """Which sample of its prompt a request is, from 0; 0 where a prompt has one sample."""
    return _count(state, "request_index") if getattr(state, "parent_req", None) is not None else 0


def _count(owner: Any, name: str) -> int:
    value = getattr(owner, name, None)
    return value if type(value) is int and value >= 0 else -1


def _between(start: float, end: float) -> float:
    """Seconds between two clock readings of which either may not have been taken yet (0)."""
    return end - start if start and end else _NAN
