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
#: A request that the front end ended counts in its step and in so many after it, see `Queues.answer`.
_AFTER = 2

#: Columns of the steps without which nothing of it is known.
NEEDED = ("num_added_reqs", "num_finished_reqs", "num_running_reqs", "num_waiting_reqs")

_Ints = npt.NDArray[np.int64]


class Queue(NamedTuple):
    """Requests of an engine. ``before + added == finished + at_end`` where nothing gets lost.

    Args:
        before: in the engine when the first step began; an estimate, never too high.
        added: since then.
        finished: since then, the aborted ones included.
        aborted: the aborted part of them.
        at_end: in the engine after the last step, as the scheduler's last stats say it.
        late: at most so many of `at_end` have ended in vLLM's front end, and the scheduler did not know it yet.

    `at_end` is one side of an account. What is told to people is `left`.
    """

    before: int
    added: int
    finished: int
    aborted: int
    at_end: int
    late: int

    @property
    def left(self) -> int:
        """How many are still there after the last step. The scheduler's last stats may count requests that the front
        end has ended since, up to `late`; how many of these there are follows from what came and what ended."""
        ended = min(self.late, self.at_end)
        return max(self.at_end - ended, min(self.at_end, self.before + self.added - self.finished))

    @property
    def ended_since(self) -> int:
        """How many of `at_end` the front end has ended."""
        return self.at_end - self.left


class QueueSteps(NamedTuple):
    """Columns of steps in order: their number, whether the scheduler's stats came, requests that run or wait, requests
    that were added, finished and aborted, and whether the level is below full."""

    step: _Ints
    known: npt.NDArray[np.bool_]
    inside: _Ints
    added: _Ints
    finished: _Ints
    aborted: _Ints
    below_full: npt.NDArray[np.bool_]


class _Step(NamedTuple):
    """One step that an answer needs: `place` is its number in the order of the records, `previous` the number of the
    step before it; `added` and `finished` count from the first step to this one."""

    place: int
    previous: int
    step: int
    inside: int
    added: int
    finished: int
    aborted: int
    finished_here: int
    below_full: bool


class Queues:
    """The queue of one engine from its steps and requests, as they come. Only the few steps that matter are kept.

    What was there before follows from a step's state: those that run or wait after it, less those that had been added,
    plus those that had finished. The scheduler may not have heard yet of a request that was added, nor of one that
    the front end ended (a stop string, an abort); with these taken off, each step gives a lower bound.
    """

    def __init__(self) -> None:
        self._places = self._added = self._finished = self._aborted = 0
        self._last_number = -(1 << 63)
        #: steps that are needed by their places: the first known ones, the last known one, those shortly before them
        self._steps: dict[int, _Step] = {}
        self._first: list[int] = []
        self._last = -1
        self._stopped: list[_Ints] = []

    def take_steps(self, s: QueueSteps) -> None:
        """Take in steps; there must be some."""
        count = len(s.step)
        known = s.known.nonzero()[0]
        first = known[: _FIRST - len(self._first)].tolist()
        ends = [*first, *known[-1:].tolist()]
        wanted = {i for end in ends for i in range(end - _AFTER, end + 1)} | set(range(count - _AFTER, count))
        added, finished = (np.cumsum(column) for column in (s.added, s.finished))
        for i in sorted(i for i in wanted if i >= 0):
            self._steps[self._places + i] = _Step(
                self._places + i,
                int(s.step[i - 1]) if i else self._last_number,
                int(s.step[i]),
                int(s.inside[i]),
                self._added + int(added[i]),
                self._finished + int(finished[i]),
                int(s.aborted[i]),
                int(s.finished[i]),
                bool(s.below_full[i]),
            )
        self._first += [self._places + i for i in first]
        if len(known):
            self._last = self._places + int(known[-1])
        self._places += count
        self._added += int(added[-1])
        self._finished += int(finished[-1])
        self._aborted += int(s.aborted.sum())
        self._last_number = int(s.step[-1])
        self._forget()

    def take_stopped(self, steps: _Ints) -> None:
        """Take in the step numbers of requests that stopped."""
        if len(steps):
            self._stopped.append(steps)
            if len(self._stopped) > 64:
                self._forget_stopped()

    def add(self, later: Queues) -> None:
        """Take in what came after all of this, which stays as it is."""
        for place, step in later._steps.items():
            previous = step.previous if place else self._last_number
            self._steps[self._places + place] = step._replace(
                place=self._places + place,
                previous=previous,
                added=self._added + step.added,
                finished=self._finished + step.finished,
            )
        self._first += [self._places + place for place in later._first[: _FIRST - len(self._first)]]
        if later._last >= 0:
            self._last = self._places + later._last
        if later._places:
            self._last_number = later._last_number
        self._places += later._places
        self._added += later._added
        self._finished += later._finished
        self._aborted += later._aborted
        self._stopped += later._stopped

    def _forget(self) -> None:
        """Drop the steps that no answer needs any more."""
        ends = {*self._first, self._last, self._places - 1}
        self._steps = {p: s for p, s in self._steps.items() if any(p + back in ends for back in range(_AFTER + 1))}

    def _forget_stopped(self) -> None:
        stopped = np.concatenate(self._stopped)
        if len(self._first) == _FIRST:
            until = self._steps[self._first[-1]].step
            begin = self._steps.get(self._last - _AFTER)
            stopped = stopped[(stopped <= until) | (stopped > (begin.previous if begin else until))]
        self._stopped = [stopped]

    def answer(self) -> Queue | None:
        """The requests so far; None without a step that brought the scheduler's stats."""
        if self._last < 0:
            return None
        stopped = np.sort(np.concatenate(self._stopped)) if self._stopped else np.empty(0, np.int64)
        before = max(s.inside + s.finished - s.added - self._late(s.place, stopped) for s in map(self._at, self._first))
        last = self._at(self._last)
        at_end = last.inside + self._added - last.added - self._finished + last.finished
        late = self._late(self._last, stopped)
        return Queue(max(0, before), self._added, self._finished, self._aborted, max(0, at_end), late)

    def _at(self, place: int) -> _Step:
        return self._steps[place]

    def _late(self, place: int, stopped: _Ints) -> int:
        """How many requests the front end may have ended in a step or in the two before. With asynchronous scheduling
        the scheduler's stats are made two batches ahead of what the front end has seen.

        Of those that stopped it is not known whether a stop string in the front end or a token in the core ended them;
        below level full it is not even known which of them stopped.
        """
        count = 0
        for p in range(max(0, place - _AFTER), place + 1):
            s = self._at(p)
            if s.below_full:
                count += s.finished_here
            else:
                begin, end = stopped.searchsorted((s.previous, s.step), side="right")
                count += s.aborted + int(end - begin)
        return count


def queue_of(steps: Table, requests: Table) -> Queue | None:
    """Count the requests of one engine; None where this vLLM does not tell enough.

    Args:
        steps: all steps of the engine, in order.
        requests: its requests, in order.
    """
    if not are_counted(steps) or not tokens_are_known(steps_by_level(steps)) or not len(steps):
        return None
    queues = Queues()
    queues.take_steps(of_table(steps, level_codes(steps) > 0))
    if has(requests, "finish_reason"):
        queues.take_stopped(requests["step"][texts(requests, "finish_reason") == "stop"])
    return queues.answer()


def are_counted(steps: Table) -> bool:
    """Whether these steps have the columns that a queue is counted from."""
    return all(has(steps, name) for name in NEEDED)


def of_table(steps: Table, below_full: npt.NDArray[np.bool_]) -> QueueSteps:
    """What `Queues` takes of steps. ``below_full``: in which of them it is not known which requests stopped."""
    aborted = floats(steps, "num_aborted_reqs").astype(np.int64)
    return QueueSteps(
        steps["step"],
        steps["has_scheduler_stats"] == 1,
        steps["num_running_reqs"] + steps["num_waiting_reqs"],
        steps["num_added_reqs"],
        steps["num_finished_reqs"],
        aborted if len(aborted) else np.zeros(len(steps), np.int64),
        below_full,
    )


def together(queues: Iterable[Queue | None]) -> Queue | None:
    """The requests of several engines; None if they are not known of each."""
    all_of_them = list(queues)
    known = [q for q in all_of_them if q is not None]
    if not known or len(known) < len(all_of_them):
        return None
    return Queue(*(sum(column) for column in zip(*known, strict=True)))
