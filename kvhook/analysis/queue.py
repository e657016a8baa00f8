"""The requests of one engine: how many were there before its first step, came, ended, and are there at the end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvhook.records.columns import Table, floats, has, texts
from kvhook.records.levels import level_codes, steps_by_level, tokens_are_known

#: So many of the first steps are asked for what was there before them: front end and scheduler may be a step apart.
_FIRST = 32

_Ints = npt.NDArray[np.int64]


class Queue(NamedTuple):
    """Requests of an engine. ``before + added == finished + at_end`` where nothing gets lost.

    Args:
        before: in the engine when the first step began; an estimate, never too high.
        added: since then.
        finished: since then, the aborted ones included.
        aborted: the aborted part of them.
        at_end: in the engine after the last step.
        late: at most so many of `at_end` have ended in vLLM's front end, and the scheduler did not know it yet.
    """

    before: int
    added: int
    finished: int
    aborted: int
    at_end: int
    late: int


def queue_of(steps: Table, requests: Table) -> Queue | None:
    """Count the requests of one engine; None where this vLLM does not tell enough.

    What was there before follows from a step's state: those that run or wait after it, less those that had been added,
    plus those that had finished. The scheduler may not have heard yet of a request that was added, nor of one that
    the front end ended (a stop string, an abort); with these taken off, each step gives a lower bound.

    Args:
        steps: all steps of the engine, in order.
        requests: its requests, in order.
    """
    known = (steps["has_scheduler_stats"] == 1).nonzero()[0]
    needed = ("num_added_reqs", "num_finished_reqs", "num_running_reqs", "num_waiting_reqs")
    if not len(known) or not all(has(steps, name) for name in needed) or not tokens_are_known(steps_by_level(steps)):
        return None
    added, finished = (np.cumsum(steps[name]) for name in ("num_added_reqs", "num_finished_reqs"))
    inside = steps["num_running_reqs"] + steps["num_waiting_reqs"]
    late = _ended_by_the_front_end(steps, requests)
    first, last = known[:_FIRST], known[-1]
    before = max(0, int((inside + finished - added - late)[first].max()))
    at_end = int(inside[last] + added[-1] - added[last] - finished[-1] + finished[last])
    aborted = int(floats(steps, "num_aborted_reqs").sum())
    return Queue(before, int(added[-1]), int(finished[-1]), aborted, max(0, at_end), int(late[last]))


def queue_of_all(steps: Table, requests: Table, engines: Iterable[int]) -> Queue | None:
    """The same of several engines together; None if it is not known of each."""
    queues = [queue_of(steps[steps["engine"] == e], requests[requests["engine"] == e]) for e in engines]
    known = [q for q in queues if q is not None]
    if not queues or len(known) < len(queues):
        return None
    return Queue(*(sum(column) for column in zip(*known, strict=True)))


def _ended_by_the_front_end(steps: Table, requests: Table) -> _Ints:
    """For each step, how many requests the front end may have ended in it or in the two before. With asynchronous
    scheduling the scheduler's stats are made two batches ahead of what the front end has seen.

    Of those that stopped it is not known whether a stop string in the front end or a token in the core ended them;
    below level full it is not even known which of them stopped.
    """
    stopped = requests[texts(requests, "finish_reason") == "stop"] if has(requests, "finish_reason") else requests[:0]
    at = np.searchsorted(steps["step"], stopped["step"]) if len(stopped) else np.empty(0, np.int64)
    count = np.bincount(at[at < len(steps)], minlength=len(steps)).astype(np.int64)
    if has(steps, "num_aborted_reqs"):
        count = count + steps["num_aborted_reqs"]
    count = np.where(level_codes(steps) > 0, steps["num_finished_reqs"], count)
    late = count.copy()
    for back in (1, 2):
        late[back:] += count[:-back]
    return late
