"""A run added up as its records come: what `kvhook.analysis.summary` is made from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvhook.analysis.queue import Queue
from kvhook.analysis.raw import Rows, split
from kvhook.analysis.request_totals import RequestTotals
from kvhook.analysis.step_totals import StepTotals
from kvhook.records.levels import tokens_are_known
from kvhook.ring.layout import FIELDS_AT, Layout
from kvhook.schema import VALUE_SERIES

if TYPE_CHECKING:
    from kvhook.ring.slots import Slots

#: The beginning of the names of a series' columns, in the order of `VALUE_SERIES`.
_PREFIXES = ("ttft", "itl")


class EngineTotals(NamedTuple):
    """Steps and finished requests of one engine, or of several."""

    steps: StepTotals
    requests: RequestTotals

    def add(self, other: EngineTotals, place: int = 0) -> None:
        """Put others to these; they stay as they are. `place`: see `StepTotals.add`."""
        self.steps.add(other.steps, place)
        self.requests.add(other.requests)


class Totals:
    """The engines of a run in numbers.

    Memory is bounded but for single values of which quantiles are asked: 8 bytes for each step time, and 16 for each
    different inter-token latency of a step.

    Args:
        runs: it will be asked now and then while it grows, see `kvhook.analysis.values.Values`.

    Attributes:
        exact: False if parts were put together in which samples of one prompt may be torn apart.
    """

    def __init__(self, *, runs: bool = False) -> None:
        self._runs = runs
        self._engines: dict[int, EngineTotals] = {}
        self._place = 0
        self.exact = True

    def take(self, slots: Slots, layout: Layout) -> None:
        """Take in usable slots, in the order of the run."""
        self._place += 1
        for engine, rows in split(slots, layout):
            if rows.kind == "meta":
                continue
            mine = self._engine(engine)
            if rows.kind == "step":
                mine.steps.take(rows, self._place)
            elif rows.kind == "request":
                mine.steps.queues.take_stopped(mine.requests.take(rows))
            else:
                _take_values(rows, layout, mine.steps)

    def add(self, later: Totals) -> None:
        """Put a later part of the run to this; it stays as it is."""
        for engine, theirs in later._engines.items():
            mine = self._engine(engine)
            self.exact &= not (theirs.requests.siblings.some or (theirs.requests.count and mine.requests.siblings.some))
            mine.add(theirs, self._place)
        self._place += later._place

    def of(self, engines: Iterable[int] | None = None) -> EngineTotals:
        """Some engines together, or all of them. Not to be changed."""
        mine = [t for e, t in self._engines.items() if engines is None or e in engines]
        if len(mine) == 1:
            return mine[0]
        together = EngineTotals(StepTotals(), RequestTotals())
        for one in mine:
            together.add(one)
        return together

    def queue(self, engine: int) -> Queue | None:
        """The requests of an engine; None where its levels do not tell."""
        steps = self.of([engine]).steps
        return steps.queues.answer() if tokens_are_known(steps.by_level) else None

    def _engine(self, engine: int) -> EngineTotals:
        if engine not in self._engines:
            self._engines[engine] = EngineTotals(
                StepTotals(runs=self._runs), RequestTotals(runs=self._runs, engine=engine)
            )
        return self._engines[engine]


def _take_values(rows: Rows, layout: Layout, steps: StepTotals) -> None:
    """Single latencies that the step records do not tell."""
    room = layout.values_per_slot
    first = FIELDS_AT + 8 * len(layout.columns["values"])
    inside = np.arange(room) < np.clip(rows.ints("count"), 0, room)[:, None]
    lists = np.ascontiguousarray(rows.slots[:, first : first + 8 * room]).view("<f8")
    for code, prefix in enumerate(_PREFIXES[: len(VALUE_SERIES)]):
        steps.latencies[prefix].take(lists[inside & (rows.ints("series") == code)[:, None]])
