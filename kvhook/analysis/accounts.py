"""Accounts of a run that must balance: two sides that come to kvhook by different ways.

The scheduler counts look-ups, queues and blocks; vLLM's front end counts tokens in steps, and again in the requests
that finish. Where two sides differ, the difference is explained by what the run shows (requests that still run, aborted
ones, repeated look-ups), or it is not explained and must be shown.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from kvhook.analysis.lookups import ONCE, how_counted
from kvhook.analysis.queue import Queue, queue_of
from kvhook.records.columns import Table, has, texts, total, with_stats
from kvhook.records.levels import steps_by_level, tokens_are_known


@dataclasses.dataclass(frozen=True)
class Account:
    """Two numbers that should be equal.

    ``ok`` says whether they are, or whether ``explained_by`` tells what made them different. ``difference`` is
    ``left - right``.
    """

    name: str
    #: what is counted: "tokens", "requests" or "steps"
    unit: str
    #: what the two sides are
    left_is: str
    right_is: str
    left: int
    right: int
    difference: int
    explained_by: str
    ok: bool
    #: the engines that it is of
    engines: tuple[int, ...]


class Reason(NamedTuple):
    """Something that can make the left side larger (up to `more`) or smaller (up to `less`) than the right one."""

    text: str
    more: int = 0
    less: int = 0


#: For a reason that can explain any difference of its sign.
ANY = 1 << 60

_LOST = "records are missing"
_BEFORE = "requests were in the queue before"
_AT_END = "requests still run or wait"
_UNFINISHED = "requests ended before their first token"
_ABORTED = "vLLM does not say how far requests were when they were aborted"
_V0 = "V0 leaves requests out of its stats that it processes early"


def accounts(steps: Table, requests: Table, engines: Sequence[dict[str, Any]], missing: int = 0) -> list[Account]:
    """Every account that this vLLM and this level give the numbers for.

    Args:
        steps: of all engines.
        requests: of all engines.
        engines: their facts.
        missing: records that are not there.
    """
    found: list[Account] = []
    for group in _groups(engines):
        numbers = [e["engine"] for e in group]
        mine = steps[np.isin(steps["engine"], numbers)]
        if len(mine):
            part = _Part(mine, requests[np.isin(requests["engine"], numbers)], group, missing)
            made = (_hits(part), _prompts(part), _generated(part), _queue(part), _blocks(part), _whole_blocks(part))
            found += [account for account in made if account is not None]
    return found


def _groups(engines: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Engines one by one; but the ranks of one AsyncLLM together: it does not know which of them a request is for."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for e in engines:
        shared = e.get("timed_steps") is False and e.get("engine_index") is not None
        key = (e.get("pid"), e.get("trace")) if shared and (e.get("data_parallel_size") or 1) > 1 else e["engine"]
        groups.setdefault(key, []).append(e)
    return list(groups.values())


class _Part:
    """What the accounts of an engine are made from."""

    def __init__(self, steps: Table, requests: Table, engines: list[dict[str, Any]], missing: int) -> None:
        self.steps, self.requests, self.engines, self.missing = steps, requests, engines, missing
        self.facts = engines[0]
        self.how = how_counted(str(self.facts.get("vllm") or ""))
        levels = steps_by_level(steps)
        self.tokens_known = tokens_are_known(levels)
        self.all_full = levels.keys() <= {"full"} and len(requests.dtype.names or ()) > 1
        self.queue: Queue | None = queue_of(steps, requests) if len(engines) == 1 else None
        self.pooling = is_pooling(steps, requests, engines)
        self.known = with_stats(steps)

    def total(self, name: str) -> int:
        return total(self.steps, name) or 0

    def column(self, name: str) -> Any:
        """Of the requests, without those for which it is not known."""
        values = self.requests[name]
        return values[values >= 0]

    def unknown(self, name: str) -> int:
        """Requests for which a number is not known."""
        return int((self.requests[name] < 0).sum()) if has(self.requests, name) else 0

    def common(self) -> list[Reason]:
        """Reasons that any account of the requests' tokens may have."""
        reasons = []
        begins_late = self.queue.before > 0 if self.queue else int(self.steps["step"][0]) > 0
        busy = self.queue.at_end > 0 if self.queue else self._busy_at_end()
        if begins_late:
            reasons.append(Reason(_BEFORE, less=ANY))
        if busy:
            reasons.append(Reason(_AT_END, more=ANY))
        if self.missing:
            reasons.append(Reason(_LOST, ANY, ANY))
        if str(self.facts.get("adapter") or "").startswith("v0"):
            reasons.append(Reason(_V0, ANY, ANY))
        return reasons

    def _busy_at_end(self) -> bool:
        names = [n for n in ("num_running_reqs", "num_waiting_reqs") if has(self.known, n)]
        return bool(len(self.known)) and any(int(self.known[n][-1]) > 0 for n in names)

    def account(
        self, name: str, unit: str, sides: tuple[str, str], left: int, right: int, reasons: Iterable[Reason]
    ) -> Account:
        difference = left - right
        fitting = [r for r in reasons if (r.more if difference > 0 else r.less) > 0]
        room = sum(r.more if difference > 0 else r.less for r in fitting)
        ok = abs(difference) <= room
        why = "; ".join(r.text for r in fitting) if difference and ok else ""
        return Account(name, unit, *sides, left, right, difference, why, ok, tuple(e["engine"] for e in self.engines))


def _hits(part: _Part) -> Account | None:
    """Tokens found in look-ups against the cached tokens of requests; at level light, against those of the steps."""
    if not has(part.steps, "prefix_cache_hits") or not part.tokens_known:
        return None
    if part.all_full and has(part.requests, "num_cached_tokens"):
        right, whose = int(part.column("num_cached_tokens").sum()), "cached tokens of requests"
    elif has(part.steps, "num_prompt_tokens_cached") and part.facts.get("splits_prompt_tokens") is not False:
        right, whose = part.total("num_prompt_tokens_cached"), "cached prompt tokens of steps"
    else:
        return None
    hits, external = part.total("prefix_cache_hits"), part.total("connector_prefix_cache_hits")
    reasons = part.common()
    if part.unknown("num_cached_tokens") or part.total("num_aborted_reqs"):
        reasons.append(Reason(_ABORTED, more=ANY))
    if part.how != ONCE and has(part.known, "num_waiting_reqs") and (part.known["num_waiting_reqs"] > 0).any():
        reasons.append(Reason("this vLLM looks up a waiting request again in each step", more=ANY))
    if part.total("num_preempted_reqs") and not has(part.steps, "prefix_cache_preempted_hits"):
        reasons.append(Reason("this vLLM counts the look-ups of re-admitted requests as new ones", more=ANY))
    elif part.how != ONCE and (again := part.total("prefix_cache_preempted_hits")):
        reasons.append(Reason("requests were re-admitted before their first token", hits, again))
    if external or part.total("num_prompt_tokens_external"):
        more = max(external, part.total("num_prompt_tokens_external"))
        reasons.append(Reason("the KV connector's tokens", more, more))
    sides = ("tokens found in look-ups", whose)
    return part.account("cached tokens", "tokens", sides, hits + external, right, reasons)


def _prompts(part: _Part) -> Account | None:
    """Prompt tokens computed and cached, of the steps, against the prompts of requests that had their first token."""
    names = ("num_prompt_tokens", "num_generation_tokens")
    if not part.all_full or not has(part.steps, names[0]) or not all(has(part.requests, n) for n in names):
        return None
    split = ("num_prompt_tokens_computed", "num_prompt_tokens_cached")
    halves = all(has(part.steps, name) for name in split)
    left = sum(part.total(name) for name in split) if halves else part.total("num_prompt_tokens")
    prompts = part.requests["num_prompt_tokens"]
    gone = np.isin(texts(part.requests, "finish_reason"), ("abort", "error"))
    begun = ~gone if part.pooling else part.requests["num_generation_tokens"] > 0
    reasons = part.common()
    ended = prompts[~begun]
    if len(ended):
        reasons.append(Reason(_UNFINISHED, ANY if (ended < 0).any() else int(ended.sum())))
    sides = ("prompt tokens computed and cached" if halves else "prompt tokens of steps", "prompts of requests")
    return part.account("prompt tokens", "tokens", sides, left, int(prompts[begun].sum()), reasons)


def _generated(part: _Part) -> Account | None:
    """Tokens generated in steps against those of the requests."""
    name = "num_generation_tokens"
    if not part.all_full or not has(part.steps, name) or not has(part.requests, name):
        return None
    reasons = part.common()
    if part.unknown(name):
        reasons.append(Reason(_ABORTED, more=ANY))
    sides = ("tokens generated in steps", "generated tokens of requests")
    return part.account("generated tokens", "tokens", sides, part.total(name), int(part.column(name).sum()), reasons)


def _queue(part: _Part) -> Account | None:
    """Requests that were there or were added against those that finished or are still there."""
    q = part.queue
    if q is None:
        return None
    reasons = []
    if part.missing:
        reasons.append(Reason(_LOST, ANY, ANY))
    if q.late:
        reasons.append(Reason("the front end ended requests before the scheduler knew", less=q.late))
    if part.facts.get("sees_schedule") is False and q.at_end:
        reasons.append(Reason("requests were on their way to the engine core", more=q.added))
    if str(part.facts.get("adapter") or "").startswith("v0"):
        reasons.append(Reason(_V0, ANY, ANY))
    sides = ("requests there before and added", "finished, running and waiting")
    return part.account("requests", "requests", sides, q.before + q.added, q.finished + q.at_end, reasons)


def _blocks(part: _Part) -> Account | None:
    """Steps in which more blocks were in use than there are, or more at the end than at the peak."""
    known = part.known
    if not has(known, "num_kv_blocks") or not has(known, "num_kv_blocks_used"):
        return None
    blocks, used = known["num_kv_blocks"], known["num_kv_blocks_used"]
    peak = known["num_kv_blocks_peak"] if has(known, "num_kv_blocks_peak") else np.full(len(known), -1)
    impossible = (blocks >= 0) & ((used > blocks) | (peak > blocks))
    above = (peak >= 0) & (used > peak)
    reasons = []
    ahead = part.facts.get("async_scheduling") is True or (part.facts.get("pipeline_parallel_size") or 1) > 1
    if ahead or part.total("connector_prefix_cache_queries"):
        reasons.append(Reason("the next step was scheduled before this one ended", more=int(above.sum())))
    sides = ("steps with more blocks in use than there can be", "none")
    return part.account("blocks in use", "steps", sides, int((impossible | above).sum()), 0, reasons)


def _whole_blocks(part: _Part) -> Account | None:
    """What is found are whole blocks, where the model has one kind of layers."""
    size = part.facts.get("block_size")
    if not has(part.steps, "prefix_cache_hits") or not size or part.facts.get("num_kv_cache_groups") != 1:
        return None
    hits = part.steps["prefix_cache_hits"]
    sides = ("tokens found in look-ups", f"whole blocks of {size} tokens among them")
    return part.account("whole blocks", "tokens", sides, int(hits.sum()), int((hits // size * size).sum()), [])


def is_pooling(steps: Table, requests: Table, engines: Iterable[dict[str, Any]]) -> bool:
    """Whether these engines pool rather than generate: vLLM says so, or nothing was generated for finished requests."""
    types = {e.get("runner_type") for e in engines}
    if types != {None}:
        return types == {"pooling"}
    ended = total(steps, "num_finished_reqs") or 0
    aborted = total(steps, "num_aborted_reqs") or 0
    of_steps = total(steps, "num_generation_tokens")
    of_requests = total(requests, "num_generation_tokens") or 0
    return bool(ended > aborted and total(steps, "num_prompt_tokens")) and of_steps == 0 and of_requests <= 0
