"""The requests that a report draws: all of them, or the slowest and an even sample."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvhook.analysis.timeline import SPAN_TYPES, TYPES, Timeline, timeline
from kvhook.records.columns import Table

#: So many requests are drawn at most, of which so many are the slowest.
MOST, SLOWEST = 12_000, 1_000


class Shown(NamedTuple):
    """The requests of one trace.

    Args:
        timeline: those that are drawn.
        number: how many there are.
    """

    timeline: Timeline
    number: int


class FrontRequests:
    """Takes in what the front end recorded of requests and of steps, as it comes, and keeps those that are drawn."""

    def __init__(self, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)
        self._kept: list[Table] = []
        self._lots: list[np.ndarray] = []
        self._waiting: dict[int, list[Table]] = {}
        self._rows = 0
        self.count = 0

    def take_requests(self, engine: int, requests: Table) -> None:
        """Finished requests of an engine; the step in which they ended comes with or after them."""
        if len(requests):
            self.count += len(requests)
            self._waiting.setdefault(engine, []).append(requests)

    def take_steps(self, engine: int, steps: Table) -> None:
        """Steps of an engine: ``engine``, ``step`` and ``t_end_ns``."""
        if engine not in self._waiting or not len(steps):
            return
        requests = np.concatenate(self._waiting.pop(engine))
        later = requests["step"] > steps["step"][-1]
        if later.any():
            self._waiting[engine] = [requests[later]]
        found = timeline(steps, requests[~later]).requests
        self._kept.append(found)
        self._lots.append(self._random.random(len(found)))
        self._rows += len(found)
        if self._rows > 4 * MOST:
            self._thin_out()

    def _thin_out(self) -> None:
        kept, lots = np.concatenate(self._kept), np.concatenate(self._lots)
        chosen = choose(kept, lots)
        self._kept, self._lots, self._rows = [kept[chosen]], [lots[chosen]], int(chosen.sum())

    def shown(self) -> Shown:
        """The requests that are drawn, in the order of arrival."""
        if not self._kept:
            return Shown(Timeline(np.empty(0, TYPES), np.empty(0, SPAN_TYPES), from_core=False), self.count)
        self._thin_out()
        kept = self._kept[0]
        order = np.argsort(np.where(np.isnan(kept["arrived"]), kept["ended"], kept["arrived"]), kind="stable")
        return Shown(Timeline(kept[order], np.empty(0, SPAN_TYPES), from_core=False), self.count)


def choose(requests: Table, lots: np.ndarray) -> np.ndarray:
    """Which requests are drawn: those that took longest, and of the others those with the smallest lots."""
    if len(requests) <= MOST:
        return np.ones(len(requests), np.bool_)
    took = requests["ended"] - requests["arrived"]
    chosen = np.zeros(len(requests), np.bool_)
    chosen[np.argsort(-np.where(np.isnan(took), -np.inf, took), kind="stable")[:SLOWEST]] = True
    others = (~chosen).nonzero()[0]
    chosen[others[np.argsort(lots[others], kind="stable")[: MOST - SLOWEST]]] = True
    return chosen


def sample(lives: Timeline, seed: int = 0) -> Shown:
    """The same of a timeline that is there as a whole."""
    chosen = choose(lives.requests, np.random.default_rng(seed).random(len(lives.requests)))
    place = np.where(chosen, np.cumsum(chosen) - 1, -1)
    spans = lives.preempted[chosen[lives.preempted["row"]]] if len(lives.preempted) else lives.preempted
    spans = spans.copy()
    spans["row"] = place[spans["row"]]
    return Shown(Timeline(lives.requests[chosen], spans, lives.from_core), len(lives.requests))
