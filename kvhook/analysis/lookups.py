"""What the numbers of the prefix cache's look-ups mean.

Which of them vLLM's own counters missed, which are repeated, which prompt tokens were never looked up, and which hits
the samples of one prompt had from each other.

vLLM has changed what it counts:

==================  =======  =================================  =================================
vLLM                unit     a request that waits for blocks    a request that comes back after a
                                                                preemption
==================  =======  =================================  =================================
0.8                 blocks   again in each step                 as a new one
0.9 to 0.11.0       tokens   again in each step                 as a new one
0.11.1 to 0.26      tokens   again in each step                 apart, again in each step
from 0.27           tokens   once, when it is admitted          apart, once per admission
==================  =======  =================================  =================================
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from kvhook.analysis.queue import Queue
from kvhook.records.columns import Table, has, total, with_stats
from kvhook.records.levels import level_codes

ONCE, AGAIN_WHILE_WAITING, AGAIN_AND_READMITTED, IN_BLOCKS = "once", "again", "again, and when re-admitted", "in blocks"

#: From which release on look-ups are counted how.
_COUNTED = (((0, 27, 0), ONCE), ((0, 11, 1), AGAIN_WHILE_WAITING), ((0, 9, 0), AGAIN_AND_READMITTED))


def how_counted(vllm: str) -> str:
    """How this release counts look-ups; "" if its version does not say which one it is, or it is older than 0.8."""
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", vllm)
    version = tuple(map(int, match.groups())) if match else ()
    if not version or version < (0, 8, 0):
        return ""
    return next((how for since, how in _COUNTED if version >= since), IN_BLOCKS)


class Missed(NamedTuple):
    """Look-ups that vLLM's own counters do not have."""

    steps: int
    queries: int
    hits: int


def missed_by_vllm(steps: Table, engines: Iterable[Mapping[str, Any]]) -> Missed | None:
    """What was looked up in steps whose stats vLLM's front end did not pass on to its loggers.

    None where that cannot be told: the user's stats are off, so that there are no counters, or the level is light.
    """
    counting = [e["engine"] for e in engines if e.get("stats_on") is True]
    if not has(steps, "scheduler_stats_logged") or not has(steps, "prefix_cache_queries"):
        return None
    mine = with_stats(steps[np.isin(steps["engine"], counting) & (level_codes(steps) == 0)])
    if not len(mine):
        return None
    dropped = mine[mine["scheduler_stats_logged"] == 0]
    looked = dropped[dropped["prefix_cache_queries"] > 0]
    return Missed(len(looked), total(looked, "prefix_cache_queries") or 0, total(looked, "prefix_cache_hits") or 0)


class SiblingHits(NamedTuple):
    """Tokens that the samples of one prompt (``n > 1``) found.

    Args:
        prompts: prompts with several samples.
        siblings: cached tokens that samples had from other samples of their prompt.
        others: cached tokens of all requests that other prompts, or earlier runs of the same one, had left there.
    """

    prompts: int
    siblings: int
    others: int


def sibling_hits(requests: Table) -> SiblingHits | None:
    """Tell the hits of samples among each other from hits across prompts; None if no prompt has several samples.

    The sample that is looked up first finds what others had left in the cache, and no sibling has computed anything
    yet. Each of the n samples would find at least that much without the others: ``n * min(num_cached_tokens)`` of
    their hits need no sibling, and the rest does. It is an estimate where blocks are evicted between the look-ups of
    two samples, or where another prompt brings the same beginning meanwhile. An aborted sample whose cached tokens
    are not known is left out.
    """
    names = ("request_id", "sample_index", "num_cached_tokens")
    if not all(has(requests, name) for name in names) or not (requests["sample_index"] > 0).any():
        return None
    groups: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    seen: dict[tuple[int, int, int], int] = defaultdict(int)
    siblings = everything = 0
    columns = (requests[name].tolist() for name in ("engine", *names))
    for engine, request_id, sample, cached in zip(*columns, strict=True):
        if cached < 0:
            continue
        everything += cached
        if request_id >= 0 and sample >= 0:
            # an id that is used again is another prompt
            use = seen[engine, request_id, sample]
            seen[engine, request_id, sample] += 1
            groups[engine, request_id, use].append(cached)
    several = [cached for cached in groups.values() if len(cached) > 1]
    siblings = sum(sum(cached) - len(cached) * min(cached) for cached in several)
    return SiblingHits(len(several), siblings, everything - siblings)


class NotLookedUp(NamedTuple):
    """Prompt tokens that never went through a look-up: of requests with ``prompt_logprobs``, and some pooling tasks.

    Args:
        tokens: how many.
        of: prompt tokens whose prefill is done.
        exact: whether it is that many, and not perhaps more.
    """

    tokens: int
    of: int
    exact: bool


def never_looked_up(steps: Table, vllm: str, queue: Queue | None) -> NotLookedUp | None:
    """Prompt tokens less first look-ups; None if the numbers show none.

    Args:
        steps: of all engines, without a gap.
        vllm: their release.
        queue: their requests.
    """
    how = how_counted(vllm)
    prompt, queries = total(steps, "num_prompt_tokens"), total(steps, "prefix_cache_queries")
    if queue is None or queue.before or how == IN_BLOCKS or prompt is None or queries is None or prompt <= queries:
        return None
    waited = has(steps, "num_waiting_reqs") and bool((with_stats(steps)["num_waiting_reqs"] > 0).any())
    # what was looked up for requests without a first token hides others that were never looked up
    settled = not queue.at_end and not queue.aborted
    return NotLookedUp(prompt - queries, prompt, settled and (how == ONCE or (how != "" and not waited)))


def repeated(steps: Table, requests: Table, vllm: str, queue: Queue | None) -> int:
    """Tokens that were looked up again for sure; 0 if the numbers show none, or this release does not do that.

    Args:
        steps: of all engines, without a gap.
        requests: of all engines.
        vllm: their release.
        queue: their requests.
    """
    prompt, queries = total(steps, "num_prompt_tokens"), total(steps, "prefix_cache_queries")
    if how_counted(vllm) in (ONCE, "") or queue is None or queue.before or queue.at_end:
        return 0
    if prompt is None or queries is None:
        return 0
    if queue.aborted:
        if not has(requests, "num_prompt_tokens"):
            return 0
        gone = requests["num_prompt_tokens"][requests["finish_reason"] == "abort"]
        if len(gone) < queue.aborted or (gone < 0).any():
            return 0
        prompt += int(gone.sum())  # some of them are in it already: it is an upper bound
    return max(0, queries - prompt)
