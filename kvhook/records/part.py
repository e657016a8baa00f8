"""A part of a run: some steps of its engines, with the requests that finished in them and their single latencies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvhook.records.sources import SlotSource, usable
from kvhook.ring.slots import fields_of, slot_head
from kvhook.schema import KINDS, META, REQUEST

if TYPE_CHECKING:
    from kvhook.ring.slots import Slots

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
#: From when to when, both included.
Interval = tuple[int, int]

#: An interval that has not ended.
FOREVER = (1 << 62) - 1


def merged(intervals: Iterable[Interval]) -> tuple[Ints, Ints]:
    """Intervals in order, those that overlap as one: their beginnings and their ends."""
    out: list[list[int]] = []
    for begin, end in sorted(intervals):
        if out and begin <= out[-1][1]:
            out[-1][1] = max(out[-1][1], end)
        elif begin <= end:
            out.append([begin, end])
    both = np.array(out, np.int64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def inside(values: Ints, intervals: Iterable[Interval]) -> Bools:
    """Which values lie in one of the intervals."""
    begins, ends = merged(intervals)
    if not len(begins):
        return np.zeros(len(values), np.bool_)
    at = np.searchsorted(begins, values, side="right") - 1
    found: Bools = (at >= 0) & (values <= ends[at])
    return found


def outside(intervals: Iterable[Interval]) -> list[Interval]:
    """The time that lies in none of some intervals."""
    begins, ends = merged(intervals)
    return list(zip([-1, *(ends + 1).tolist()], [*(begins - 1).tolist(), FOREVER], strict=True))


class StepRanges:
    """Some steps of each engine, by their numbers.

    Args:
        engines: the engine of each step.
        steps: its number.
    """

    def __init__(self, engines: Ints, steps: Ints) -> None:
        self.ranges: dict[int, list[Interval]] = {}
        for engine in np.unique(engines).tolist():
            numbers = np.unique(steps[engines == engine])
            breaks = np.flatnonzero(np.diff(numbers) > 1)
            begins, ends = numbers[np.append(0, breaks + 1)], numbers[np.append(breaks, len(numbers) - 1)]
            self.ranges[engine] = list(zip(begins.tolist(), ends.tolist(), strict=True))

    @property
    def engines(self) -> Sequence[int]:
        """The engines that have steps here."""
        return list(self.ranges)

    def hold(self, engines: npt.NDArray[np.int32], steps: Ints) -> Bools:
        """Which of these steps are among them."""
        out = np.zeros(len(steps), np.bool_)
        for engine, ranges in self.ranges.items():
            mine = engines == engine
            out[mine] = inside(steps[mine], ranges)
        return out


class PartSlots(SlotSource):
    """The records of a source that belong to some steps. Facts are left out: they have been read.

    Args:
        source: the whole of it.
        steps: which steps.
        requests: engine -> the numbers of the requests that count; None: all that finished in these steps.
    """

    def __init__(self, source: SlotSource, steps: StepRanges, requests: Mapping[int, Ints] | None = None) -> None:
        super().__init__(source.layout, source.header)
        self._source, self._steps, self._requests = source, steps, requests

    def chunks(self) -> Iterator[Slots]:
        """The records of the part."""
        for slots in self._source.chunks():
            slots = slots[usable(slots)]
            part = slots[self._mask(slots)]
            if len(part):
                yield part

    def _mask(self, slots: Slots) -> Bools:
        head = slot_head(slots)
        keep = np.zeros(len(slots), np.bool_)
        for kind, (code, _) in KINDS.items():
            columns = self.layout.columns[kind]
            if code == META or not any(c.name == "step" for c in columns):
                continue
            at = (head["kind"] == code).nonzero()[0]
            fields = fields_of(slots[at], columns)
            mine = self._steps.hold(head["engine"][at], fields["step"])
            if code == REQUEST and self._requests is not None:
                mine &= self._wanted(head["engine"][at], fields["request"])
            keep[at] = mine
        return keep

    def _wanted(self, engines: npt.NDArray[np.int32], numbers: Ints) -> Bools:
        assert self._requests is not None
        out = np.zeros(len(numbers), np.bool_)
        for engine, wanted in self._requests.items():
            mine = engines == engine
            out[mine] = np.isin(numbers[mine], wanted)
        return out
