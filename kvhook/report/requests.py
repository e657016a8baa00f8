"""The requests that a report draws: all of them, or the slowest and an even sample."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from kvhook.analysis.timeline import SPAN_TYPES, TYPES, Timeline, preempted_spans, rows_of_cores, timeline
from kvhook.records.columns import Table, has
from kvhook.records.core import CoreRecords

#: So many requests are drawn at most, of which so many are the slowest.
MOST, SLOWEST = 12_000, 1_000
#: What is read of preemptions, and of look-ups after them.
_EVENT = ("core", "request", "t_ns", "resumed")


class Shown(NamedTuple):
    """The requests of one trace.

    Args:
        timeline: those that are drawn.
        number: how many there are.
    """

    timeline: Timeline
    number: int


class _Kept:
    """Takes in rows of a timeline as they come, and keeps those that are drawn."""

    def __init__(self, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)
        self._rows: list[Table] = [np.empty(0, TYPES)]
        self._lots: list[np.ndarray] = [np.empty(0)]
        self._size = 0

    def take(self, rows: Table) -> None:
        """Take rows in."""
        self._rows.append(rows)
        self._lots.append(self._random.random(len(rows)))
        self._size += len(rows)
        if self._size > 4 * MOST:
            self._thin_out()

    def _thin_out(self) -> None:
        rows, lots = np.concatenate(self._rows), np.concatenate(self._lots)
        chosen = choose(rows, lots)
        self._rows, self._lots, self._size = [rows[chosen]], [lots[chosen]], int(chosen.sum())

    def rows(self) -> Table:
        """The rows that are drawn, in the order of arrival."""
        self._thin_out()
        (kept,) = self._rows
        ordered: Table = kept[
            np.argsort(np.where(np.isnan(kept["arrived"]), kept["ended"], kept["arrived"]), kind="stable")
        ]
        return ordered


class FrontRequests:
    """Takes in what the front end recorded of requests and of steps, as it comes, and keeps those that are drawn."""

    def __init__(self) -> None:
        self._kept = _Kept()
        self._waiting: dict[int, list[Table]] = {}
        self._count = 0

    def take_requests(self, engine: int, requests: Table) -> None:
        """Finished requests of an engine; the step in which they ended comes with or after them."""
        if len(requests):
            self._count += len(requests)
            self._waiting.setdefault(engine, []).append(requests)

    def take_steps(self, engine: int, steps: Table) -> None:
        """Steps of an engine: ``engine``, ``step`` and ``t_end_ns``."""
        if engine not in self._waiting or not len(steps):
            return
        requests = np.concatenate(self._waiting.pop(engine))
        later = requests["step"] > steps["step"][-1]
        if later.any():
            self._waiting[engine] = [requests[later]]
        self._kept.take(timeline(steps, requests[~later]).requests)

    def shown(self) -> Shown:
        """The requests that are drawn, in the order of arrival."""
        return Shown(Timeline(self._kept.rows(), np.empty(0, SPAN_TYPES), from_core=False), self._count)


def core_requests(cores: CoreRecords) -> Shown | None:
    """The same of what engine cores recorded; None if they recorded no request. It is read piece by piece."""
    kept, count = _Kept(), 0
    for requests in cores.pieces("core_request"):
        rows = rows_of_cores(requests)
        count += len(rows)
        kept.take(rows)
    if not count:
        return None
    rows = kept.rows()
    drawn = set(zip(rows["engine"].tolist(), rows["request"].tolist(), strict=True))
    spans = preempted_spans(
        rows,
        _of_some(cores.pieces("preemption"), drawn),
        _of_some((piece[piece["resumed"] == 1] for piece in cores.pieces("lookup")), drawn),
    )
    return Shown(Timeline(rows, spans, from_core=True), count)


def _of_some(pieces: Iterable[Table], requests: set[tuple[int, int]]) -> Table:
    """The rows of some requests, of which each is a core and a number."""
    found = [np.empty(0, [(name, "<i8") for name in _EVENT])]
    for piece in pieces:
        ids = zip(piece["core"].tolist(), piece["request"].tolist(), strict=True)
        mine = piece[[one in requests for one in ids]]
        some = np.empty(len(mine), found[0].dtype)
        for name in _EVENT:
            some[name] = mine[name] if has(mine, name) else 1
        found.append(some)
    return np.concatenate(found)


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
