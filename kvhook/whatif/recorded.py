"""The requests of a recorded run, put together from what its engine cores wrote down.

Every block of a request was found in the cache (an event "hit") or computed (an event "cache"), so that the ledger of
blocks (``core="blocks"``) holds the digests of all of them, prompt and generated tokens alike. A request that was
aborted before its prompt was computed is known in part only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kvhook.core_schema import BLOCK_EVENTS
from kvhook.errors import KvhookError
from kvhook.records.columns import Table
from kvhook.records.core import CoreRecords
from kvhook.whatif.replay import Rules
from kvhook.whatif.requests import BlockRequests, Ints

_HIT, _CACHE = BLOCK_EVENTS.index("hit"), BLOCK_EVENTS.index("cache")
_NO_LEDGER = (
    "kvhook did not write down the blocks of this run: record it with kvhook.install(core='blocks'), or in the shell "
    "with KVHOOK_CORE=blocks"
)
_GROUPS = (
    "this model has several KV cache groups (hybrid attention), whose blocks are found and evicted apart: what another "
    "cache would have done is known for models with one group only"
)
_KIND = (
    "this model's KV cache is of the kind {kind}, whose blocks are found and given up by other rules: what another "
    "cache would have done is known for full attention only"
)
_NOT_CACHED = "prefix caching was off in this run, so that vLLM made no digests of blocks"
_DAMAGED = "this file is damaged: it has numbers of requests and tokens that no engine core counts"

#: Limits of what is believed, far beyond what engines do: tokens of one request, blocks of requests for each look-up
#: and step in the file, and requests without a look-up for each that has one.
_MOST_TOKENS, _MOST_BLOCKS, _MOST_MISSING = 1 << 40, 4096, 1000


class NotKnown(KvhookError):
    """It cannot be told of this run; the message says why."""


def recorded_requests(cores: CoreRecords) -> BlockRequests:
    """The requests of a run.

    Raises:
        NotKnown: the run does not tell.
    """
    if not len(cores):
        raise NotKnown(f"there are no records of engine cores: {cores.why_none}")
    _check(cores)
    parts = [_of_core(cores, core) for core in range(len(cores))]
    parts = [part for part in parts if len(part["prompt"])]
    if not parts:
        raise NotKnown(_NO_LEDGER if not _has_events(cores) else "no request was looked up in this run")
    digests, known = np.unique(np.concatenate([part["digests"] for part in parts]), return_inverse=True)
    known = known.reshape(-1).astype(np.int64)
    # a block that was never computed has the digest 0: each gets an id of its own
    blank = np.concatenate([part["digests"] for part in parts]) == 0
    known[blank] = len(digests) + np.arange(blank.sum())
    columns = {
        name: np.concatenate([part[name] for part in parts])
        for name in ("prompt", "generated", "looked_up", "t_ns", "arrival", "wave", "delay", "epoch", "core", "found")
    }
    counts = np.concatenate([part["counts"] for part in parts])
    return BlockRequests(
        block_size=int(cores.facts[0]["block_size"]),
        offsets=np.concatenate(([0], np.cumsum(counts))).astype(np.int64),
        ids=np.unique(known, return_inverse=True)[1].reshape(-1).astype(np.int64),
        num_prompt_tokens=columns.pop("prompt"),
        num_generation_tokens=columns.pop("generated"),
        num_unknown=int(blank.sum()),
        **columns,
    )


def rules_of(facts: Mapping[str, Any]) -> Rules:
    """How an engine core scheduled, as far as its facts tell; the rest is as in the newest vLLM.

    Args:
        facts: of the engine core.
    """
    known = {
        "token_budget": facts.get("token_budget") or facts.get("max_num_batched_tokens"),
        "max_num_seqs": facts.get("max_num_seqs"),
        "chunked": facts.get("enable_chunked_prefill"),
        "whole_prompt_must_fit": facts.get("whole_prompt_must_fit"),
        "empty_blocks_first": facts.get("empty_blocks_first"),
        "watermark": facts.get("watermark"),
    }
    return Rules(**{name: value for name, value in known.items() if value is not None})


def _check(cores: CoreRecords) -> None:
    for facts in cores.facts:
        if len(facts.get("kv_groups") or ()) > 1:
            raise NotKnown(_GROUPS)
        if facts.get("plain_attention") is False:
            raise NotKnown(_KIND.format(kind=facts["kv_groups"][0]["kind"]))
        if facts.get("enable_prefix_caching") is False:
            raise NotKnown(_NOT_CACHED)
        if facts.get("core_level") != "blocks":
            raise NotKnown(_NO_LEDGER)
    sizes = {facts.get("block_size") for facts in cores.facts}
    if len(sizes) > 1 or not all(sizes):
        raise NotKnown(f"the engines of this run have blocks of different sizes: {sorted(map(str, sizes))}")


def _has_events(cores: CoreRecords) -> bool:
    return any(len(some) for core in range(len(cores)) for some in cores.block_events(core))


def _of_core(cores: CoreRecords, core: int) -> dict[str, Any]:
    """The columns of the requests of one engine core, in the order in which they were first admitted."""
    lookups, lives, steps = cores.lookups(core), cores.requests(core), cores.steps(core)
    first = lookups[lookups["resumed"] == 0]
    numbers = first["request"]
    size = int(cores.facts[core]["block_size"])
    at = {number: place for place, number in enumerate(lives["request"].tolist())}
    place = np.array([at.get(number, -1) for number in numbers.tolist()], np.int64)
    ended = place >= 0
    life = lives[place[ended]]
    prompt, generated = first["num_tokens"].copy(), np.ones(len(first), np.int64)
    prompt[ended], generated[ended] = life["num_prompt_tokens"], life["num_generation_tokens"]
    arrived, finished = first["step"].copy(), np.full(len(first), np.iinfo(np.int64).max)
    arrived[ended], finished[ended] = life["arrived_step"], life["finished_step"]
    t_ns = first["t_ns"].copy()
    t_ns[ended] = np.where(life["t_arrived_ns"] >= 0, life["t_arrived_ns"], t_ns[ended])
    t_ns += cores.clock_ahead(core)
    _check_numbers(numbers, prompt, generated)
    counts = (prompt + np.maximum(generated - 1, 0)) // size
    if counts.sum() > _MOST_BLOCKS * (len(first) + len(steps)):
        raise NotKnown(_DAMAGED)
    wave, delay = busy_times(numbers, arrived, finished)
    resets = steps["step"][steps["prefix_cache_reset"] == 1]
    return {
        "prompt": prompt,
        "generated": generated,
        "looked_up": first["miss_reason"] != "not_looked_up",
        "t_ns": t_ns,
        "arrival": numbers,
        "wave": wave,
        "delay": delay,
        "epoch": np.searchsorted(resets, first["step"], side="right"),
        "core": np.full(len(first), core),
        "found": first["num_found_tokens"],
        "counts": counts,
        "digests": _digests(cores, core, numbers, counts),
    }


def _check_numbers(*columns: Ints) -> None:
    """A file may say anything; what is made of it here must fit into memory.

    Raises:
        NotKnown: there are numbers that no engine core counts.
    """
    if any(len(column) and not 0 <= column.min() <= column.max() <= _MOST_TOKENS for column in columns):
        raise NotKnown(_DAMAGED)


def busy_times(numbers: Ints, arrived: Ints, finished: Ints) -> tuple[Ints, Ints]:
    """For each request the number of the busy time in which it came, and how many steps after the begin of it.

    Args:
        numbers: places in the order of arrival.
        arrived: the first step that was scheduled after each request came.
        finished: the last step that was scheduled before it ended.
    """
    wave, delay = np.zeros(len(numbers), np.int64), np.zeros(len(numbers), np.int64)
    current, begin, last = -1, 0, -1
    for place in np.argsort(numbers, kind="stable").tolist():
        step = int(arrived[place])
        if current < 0 or last < step:
            # all that came before had ended
            current, begin = current + 1, step
        wave[place], delay[place] = current, step - begin
        last = max(last, int(finished[place]))
    return wave, delay


def _digests(cores: CoreRecords, core: int, numbers: Ints, counts: Ints) -> Any:
    """The digests of the blocks of each request, one request after the other; 0 for a block that was never computed."""
    offsets = np.concatenate(([0], np.cumsum(counts)))
    digests = np.zeros(offsets[-1], "<u8")
    if not len(numbers):
        return digests
    # requests are numbered as they come, so that few numbers between the first and the last are missing
    first, span = int(numbers.min()), int(np.ptp(numbers)) + 1
    if span > _MOST_MISSING * (1000 + len(numbers)):
        raise NotKnown(_DAMAGED)
    place = np.full(span, -1, np.int64)
    place[numbers - first] = np.arange(len(numbers))
    last = (-1, -1, 0)
    for events in cores.block_events(core):
        cached = events[events["event"] == _CACHE]
        _put(
            digests,
            offsets,
            counts,
            place,
            cached["request"].astype(np.int64) - first,
            cached["index"],
            cached["digest"],
        )
        hits = events[events["event"] == _HIT]
        index, last = _indices(hits, last)
        request = hits["request"].astype(np.int64) - first
        _put(digests, offsets, counts, place, request, index, hits["digest"])
    return digests


def _indices(hits: Table, last: tuple[int, int, int]) -> tuple[Ints, tuple[int, int, int]]:
    """Which block of its request each hit was: a request takes what it has found in order, in one go.

    Args:
        hits: events.
        last: request and step of the last hit before these, and how many hits they had.
    """
    if not len(hits):
        return np.empty(0, np.int64), last
    request, step = hits["request"].astype(np.int64), hits["step"].astype(np.int64)
    begins = np.flatnonzero(np.concatenate(([True], (request[1:] != request[:-1]) | (step[1:] != step[:-1]))))
    lengths = np.diff(np.concatenate((begins, [len(hits)])))
    index = np.arange(len(hits)) - np.repeat(begins, lengths)
    before = last[2] if (int(request[0]), int(step[0])) == last[:2] else 0
    index[: lengths[0]] += before
    return index, (int(request[-1]), int(step[-1]), int(index[-1]) + 1)


def _put(digests: Any, offsets: Ints, counts: Ints, place: Ints, request: Any, index: Any, digest: Any) -> None:
    known = (request >= 0) & (request < len(place))
    at = np.where(known, place[np.where(known, request, 0)], -1)
    fits = (at >= 0) & (index >= 0) & (index < counts[at])
    digests[offsets[at[fits]] + index[fits]] = digest[fits]


def why_estimated(cores: CoreRecords, requests: BlockRequests) -> Sequence[str]:
    """Why a replay of this run can only be an estimate, whatever the size of the cache; empty if nothing speaks
    against it."""
    reasons = []
    lives, steps = cores.requests(), cores.steps()
    lost = cores.lost + cores.lost_in_ledgers()
    if _was_reset_in_between(cores):
        reasons.append("the prefix cache was reset while requests were being worked on")
    if lost:
        reasons.append(f"{lost:,} records of the engine core were lost")
    if requests.num_unknown:
        reasons.append(f"{requests.num_unknown:,} blocks of requests were never computed, so that nobody knows them")
    if requests.delay.any():
        reasons.append("requests came while others ran, and would come at other steps")
    if (lives["finish_reason"] == "abort").any():
        reasons.append("requests were aborted")
    if len(lives) < len(requests):
        reasons.append(f"{len(requests) - len(lives):,} requests had not ended")
    for facts in cores.facts:
        for what, name in (
            ("async_scheduling", "steps are scheduled before the last one has ended (async_scheduling)"),
            ("num_spec_tokens", "tokens are speculated"),
            ("long_prefill_token_threshold", "long prompts are cut (long_prefill_token_threshold)"),
            ("connector", "a KV connector has blocks of its own"),
            ("lora", "requests may wait for a LoRA adapter"),
            ("encoder_budget", "requests may wait for the encoder"),
        ):
            if facts.get(what):
                reasons.append(name)
        for what, name in (
            ("data_parallel_size", "a router chooses the engine of each request"),
            ("pipeline_parallel_size", "steps are scheduled before the last one has ended (pipeline parallelism)"),
            ("num_front_ends", "several front ends send requests"),
        ):
            if (facts.get(what) or 1) > 1:
                reasons.append(name)
        if facts.get("parent") not in (None, facts.get("pid")) and _several_at_once(requests):
            reasons.append("requests came one by one to an engine core in a process of its own")
        if facts.get("policy") not in (None, "fcfs"):
            reasons.append(f"the scheduling policy is {facts['policy']}")
        if facts.get("token_budget") is None:
            reasons.append("the run was recorded by a kvhook that did not write down how vLLM schedules")
    if len({(facts.get("num_kv_blocks"), rules_of(facts)) for facts in cores.facts}) > 1:
        reasons.append("the engines of this run had different settings, and those of the first are taken for all")
    if "num_skipped_waiting_reqs" in (steps.dtype.names or ()) and (steps["num_skipped_waiting_reqs"] > 0).any():
        reasons.append("requests were passed over for others")
    waits = set(steps["limited_by"].tolist()) & set(_WAITS)
    reasons += [f"requests waited for {_WAITS[name]}" for name in sorted(waits)]
    return list(dict.fromkeys(reasons))


def _several_at_once(requests: BlockRequests) -> bool:
    """Whether requests were sent without waiting for the one before."""
    together = np.stack((requests.core, requests.wave))
    return len(np.unique(together, axis=1).T) < len(requests)


def _was_reset_in_between(cores: CoreRecords) -> bool:
    """Whether the cache was reset after a busy time had begun and before it had ended."""
    for core in range(len(cores)):
        lives, steps = cores.requests(core), cores.steps(core)
        resets = steps["step"][steps["prefix_cache_reset"] == 1]
        if not len(resets) or not len(lives):
            continue
        arrived, finished = lives["arrived_step"], lives["finished_step"]
        wave, _ = busy_times(lives["request"], arrived, finished)
        begin, end = np.full(len(wave), np.iinfo(np.int64).max), np.full(len(wave), -1)
        np.minimum.at(begin, wave, arrived)
        np.maximum.at(end, wave, finished)
        some = end >= 0
        if (np.searchsorted(resets, begin[some], "right") < np.searchsorted(resets, end[some], "right")).any():
            return True
    return False


_WAITS = {
    "lora": "a LoRA adapter",
    "encoder_budget": "the encoder",
    "structured_output": "a grammar",
    "remote_kv": "KV transfers",
    "paused": "a pause to end",
    "deferred": "what kvhook does not know",
}
