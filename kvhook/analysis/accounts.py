"""Accounts of a run that must balance: two sides that come to kvhook by different ways.

The scheduler counts look-ups, queues and blocks; vLLM's front end counts tokens in steps, and again in the requests
that finish. Where two sides differ, the difference is explained by what the run shows (requests that still run, aborted
ones, repeated look-ups), or it is not explained and must be shown.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from kvhook.analysis.lookups import ONCE, how_counted
from kvhook.analysis.part import Part
from kvhook.analysis.queue import NEEDED, Queue, together
from kvhook.analysis.request_totals import Prompts
from kvhook.analysis.totals import Totals
from kvhook.records.levels import NOBODY_COUNTED, tokens_are_known


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


def accounts(totals: Totals, whole: Part, missing: int = 0) -> list[Account]:
    """Every account that this vLLM and this level give the numbers for.

    Args:
        totals: of the run.
        whole: all of its engines.
        missing: records that are not there.
    """
    found: list[Account] = []
    for group in _groups(whole.engines):
        part = _Side(totals, group, whole.columns, missing)
        if part.steps.steps:
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


class _Side(Part):
    """What the accounts of an engine are made from."""

    def __init__(
        self, totals: Totals, engines: list[dict[str, Any]], columns: dict[str, frozenset[str]], missing: int
    ) -> None:
        super().__init__(totals, engines, columns)
        self.missing = missing
        self.facts = engines[0]
        self.how = how_counted(str(self.facts.get("vllm") or ""))
        levels = self.steps.by_level
        self.tokens_known = tokens_are_known(levels)
        self.all_full = levels.keys() <= {"full"} and bool(columns["request"])
        self.queue: Queue | None = queue_of_all(totals, self) if len(engines) == 1 else None
        self.pooling = is_pooling(self)

    def sum(self, column: str) -> int:
        return self.total(column) or 0

    def common(self) -> list[Reason]:
        """Reasons that any account of the requests' tokens may have."""
        reasons = []
        begins_late = self.queue.before > 0 if self.queue else (self.steps.first or (0, 0))[1] > 0
        busy = self.queue.left > 0 if self.queue else self._busy_at_end()
        if begins_late:
            reasons.append(Reason(_BEFORE, less=ANY))
        if busy:
            reasons.append(Reason(_AT_END, more=ANY))
        return [*reasons, *self.of_all()]

    def of_all(self) -> list[Reason]:
        """Reasons that any account of requests or their tokens may have."""
        reasons = []
        if self.missing:
            reasons.append(Reason(_LOST, ANY, ANY))
        if any(e.get("tokens_not_counted") for e in self.engines):
            reasons.append(Reason(NOBODY_COUNTED, ANY, ANY))
        if str(self.facts.get("adapter") or "").startswith("v0"):
            reasons.append(Reason(_V0, ANY, ANY))
        return reasons

    def _busy_at_end(self) -> bool:
        states = self.steps.last_known[1] if self.steps.last_known else {}
        return any(value > 0 for name, value in states.items() if self.has(name))

    def account(
        self, name: str, unit: str, sides: tuple[str, str], left: int, right: int, reasons: Iterable[Reason]
    ) -> Account:
        difference = left - right
        fitting = [r for r in reasons if (r.more if difference > 0 else r.less) > 0]
        room = sum(r.more if difference > 0 else r.less for r in fitting)
        ok = abs(difference) <= room
        why = "; ".join(r.text for r in fitting) if difference and ok else ""
        return Account(name, unit, *sides, left, right, difference, why, ok, tuple(e["engine"] for e in self.engines))


def _hits(part: _Side) -> Account | None:
    """Tokens found in look-ups against the cached tokens of requests; at level light, against those of the steps."""
    if not part.has("prefix_cache_hits") or not part.tokens_known:
        return None
    if part.all_full and part.has_request("num_cached_tokens"):
        right, whose = part.requests.sums["num_cached_tokens"], "cached tokens of requests"
    elif part.has("num_prompt_tokens_cached") and part.facts.get("splits_prompt_tokens") is not False:
        right, whose = part.sum("num_prompt_tokens_cached"), "cached prompt tokens of steps"
    else:
        return None
    hits, external = part.sum("prefix_cache_hits"), part.sum("connector_prefix_cache_hits")
    reasons = part.common()
    unknown = part.requests.unknown["num_cached_tokens"] if part.has_request("num_cached_tokens") else 0
    if unknown or part.sum("num_aborted_reqs"):
        reasons.append(Reason(_ABORTED, more=ANY))
    if part.how != ONCE and part.has("num_waiting_reqs") and part.steps.waited:
        reasons.append(Reason("this vLLM looks up a waiting request again in each step", more=ANY))
    if part.sum("num_preempted_reqs") and not part.has("prefix_cache_preempted_hits"):
        reasons.append(Reason("this vLLM counts the look-ups of re-admitted requests as new ones", more=ANY))
    elif part.how != ONCE and (again := part.sum("prefix_cache_preempted_hits")):
        reasons.append(Reason("requests were re-admitted before their first token", hits, again))
    if external or part.sum("num_prompt_tokens_external"):
        more = max(external, part.sum("num_prompt_tokens_external"))
        reasons.append(Reason("the KV connector's tokens", more, more))
    sides = ("tokens found in look-ups", whose)
    return part.account("cached tokens", "tokens", sides, hits + external, right, reasons)


def _prompts(part: _Side) -> Account | None:
    """Prompt tokens computed and cached, of the steps, against the prompts of requests that had their first token."""
    names = ("num_prompt_tokens", "num_generation_tokens")
    if not part.all_full or not part.has(names[0]) or not all(map(part.has_request, names)):
        return None
    split = ("num_prompt_tokens_computed", "num_prompt_tokens_cached")
    halves = all(map(part.has, split))
    left = sum(part.sum(name) for name in split) if halves else part.sum("num_prompt_tokens")
    with_first_token, ended = Prompts(), Prompts()
    for (gone, generated), prompts in part.requests.prompts.items():
        (with_first_token if (not gone if part.pooling else generated) else ended).add(prompts)
    reasons = part.common()
    if ended.count:
        reasons.append(Reason(_UNFINISHED, ANY if ended.unknown else ended.tokens))
    sides = ("prompt tokens computed and cached" if halves else "prompt tokens of steps", "prompts of requests")
    return part.account("prompt tokens", "tokens", sides, left, with_first_token.tokens, reasons)


def _generated(part: _Side) -> Account | None:
    """Tokens generated in steps against those of the requests."""
    name = "num_generation_tokens"
    if not part.all_full or not part.has(name) or not part.has_request(name):
        return None
    reasons = part.common()
    if part.requests.unknown[name]:
        reasons.append(Reason(_ABORTED, more=ANY))
    sides = ("tokens generated in steps", "generated tokens of requests")
    return part.account("generated tokens", "tokens", sides, part.sum(name), part.requests.sums[name], reasons)


def _queue(part: _Side) -> Account | None:
    """Requests that were there or were added against those that finished or are still there."""
    q = part.queue
    if q is None:
        return None
    reasons = part.of_all()
    if q.late:
        reasons.append(Reason("the front end ended requests before the scheduler knew", less=q.late))
    if part.facts.get("sees_schedule") is False and q.left:
        reasons.append(Reason("requests were on their way to the engine core", more=q.added))
    sides = ("requests there before and added", "finished, running and waiting")
    return part.account("requests", "requests", sides, q.before + q.added, q.finished + q.at_end, reasons)


def _blocks(part: _Side) -> Account | None:
    """Steps in which more blocks were in use than there are, or more at the end than at the peak."""
    if not part.has("num_kv_blocks") or not part.has("num_kv_blocks_used"):
        return None
    reasons = []
    ahead = part.facts.get("async_scheduling") is True or (part.facts.get("pipeline_parallel_size") or 1) > 1
    if ahead or part.sum("connector_prefix_cache_queries"):
        reasons.append(Reason("the next step was scheduled before this one ended", more=part.steps.blocks_above_peak))
    sides = ("steps with more blocks in use than there can be", "none")
    return part.account("blocks in use", "steps", sides, part.steps.impossible_blocks, 0, reasons)


def _whole_blocks(part: _Side) -> Account | None:
    """What is found are whole blocks, where the model has one kind of layers."""
    size = part.facts.get("block_size")
    if not part.has("prefix_cache_hits") or not size or part.facts.get("num_kv_cache_groups") != 1:
        return None
    whole = sum(hits // size * size * steps for hits, steps in part.steps.hits.items())
    sides = ("tokens found in look-ups", f"whole blocks of {size} tokens among them")
    return part.account("whole blocks", "tokens", sides, part.sum("prefix_cache_hits"), whole, [])


def queue_of_all(totals: Totals, part: Part) -> Queue | None:
    """The requests of engines that made steps, together; None where it is not known of each."""
    if not all(map(part.has, NEEDED)):
        return None
    return together(totals.queue(e["engine"]) for e in part.engines if totals.of([e["engine"]]).steps.steps)


def is_pooling(part: Part) -> bool:
    """Whether these engines pool rather than generate: vLLM says so, or nothing was generated for finished requests."""
    types = {e.get("runner_type") for e in part.engines}
    if types != {None}:
        return types == {"pooling"}
    ended = part.total("num_finished_reqs") or 0
    aborted = part.total("num_aborted_reqs") or 0
    of_steps = part.total("num_generation_tokens")
    of_requests = part.requests.generated if part.has_request("num_generation_tokens") else 0
    return bool(ended > aborted and part.total("num_prompt_tokens")) and of_steps == 0 and of_requests <= 0
