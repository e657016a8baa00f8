"""What the numbers of the prefix cache's look-ups mean.

Which of them vLLM's own counters missed, which are repeated, and which prompt tokens were never looked up.

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
from typing import NamedTuple

from kvhook.analysis.part import Part
from kvhook.analysis.queue import Queue
from kvhook.analysis.totals import Totals

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


def missed_by_vllm(part: Part, totals: Totals) -> Missed | None:
    """What was looked up in steps whose stats vLLM's front end did not pass on to its loggers.

    None where that cannot be told: the user's stats are off, so that there are no counters, or the level is light.
    """
    if not part.has("scheduler_stats_logged") or not part.has("prefix_cache_queries"):
        return None
    steps = totals.of([e["engine"] for e in part.engines if e.get("stats_on") is True]).steps
    if not steps.logged_known:
        return None
    return Missed(steps.missed_steps, steps.missed_queries, steps.missed_hits)


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


def never_looked_up(part: Part, vllm: str, queue: Queue | None) -> NotLookedUp | None:
    """Prompt tokens less first look-ups; None if the numbers show none.

    Args:
        part: all engines, without a gap.
        vllm: their release.
        queue: their requests.
    """
    how = how_counted(vllm)
    prompt, queries = part.total("num_prompt_tokens"), part.total("prefix_cache_queries")
    if queue is None or queue.before or how == IN_BLOCKS or prompt is None or queries is None or prompt <= queries:
        return None
    waited = part.has("num_waiting_reqs") and part.steps.waited
    # what was looked up for requests without a first token hides others that were never looked up
    settled = not queue.left and not queue.aborted
    return NotLookedUp(prompt - queries, prompt, settled and (how == ONCE or (how != "" and not waited)))


def repeated(part: Part, vllm: str, queue: Queue | None) -> int:
    """Tokens that were looked up again for sure; 0 if the numbers show none, or this release does not do that.

    Args:
        part: all engines, without a gap.
        vllm: their release.
        queue: their requests.
    """
    prompt, queries = part.total("num_prompt_tokens"), part.total("prefix_cache_queries")
    if how_counted(vllm) in (ONCE, "") or queue is None or queue.before or queue.left:
        return 0
    if prompt is None or queries is None:
        return 0
    if queue.aborted:
        gone = part.requests.aborted
        if not part.has_request("num_prompt_tokens") or gone.count < queue.aborted or gone.unknown:
            return 0
        prompt += gone.tokens  # some of them are in it already: it is an upper bound
    return max(0, queries - prompt)
