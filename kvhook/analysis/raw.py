"""Raw slots of one kind and one engine, column by column. A column is copied out when it is first asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvhook.ring.layout import Layout
from kvhook.ring.slots import slot_head
from kvhook.schema import KINDS, blank

if TYPE_CHECKING:
    from kvhook.ring.slots import Slots

_NAMES = {code: name for name, (code, _) in KINDS.items()}
_BLANKS = {name: {f.name: float(blank(f)) for f in fields} for name, (_, fields) in KINDS.items()}


class Rows:
    """Slots of one kind. A column that they do not hold reads as blank.

    Args:
        slots: whole slots, one after the other in memory.
        layout: of the slots.
        kind: what they hold.
    """

    def __init__(self, slots: Slots, layout: Layout, kind: str) -> None:
        self.kind = kind
        self.slots = slots
        self._blanks = _BLANKS[kind]
        self._words = slots.view("<i8")
        self._columns = {c.name: c for c in layout.columns[kind]}
        self._read: dict[str, npt.NDArray[np.int64]] = {}

    def __len__(self) -> int:
        return len(self._words)

    def ints(self, name: str) -> npt.NDArray[np.int64]:
        """A column of whole numbers."""
        if name not in self._read:
            column = self._columns.get(name)
            if column is None:
                self._read[name] = np.full(len(self), int(self._blanks.get(name, 0)))
            else:
                self._read[name] = np.ascontiguousarray(self._words[:, column.offset // 8])
        return self._read[name]

    def floats(self, name: str) -> npt.NDArray[np.float64]:
        """A column of floats."""
        column = self._columns.get(name)
        if column is None:
            return np.full(len(self), self._blanks.get(name, 0.0))
        return np.ascontiguousarray(self._words[:, column.offset // 8]).view("<f8")

    def sums(self) -> dict[str, int]:
        """The sum of every column of whole numbers that is there."""
        total = self._words.sum(axis=0)
        return {c.name: int(total[c.offset // 8]) for c in self._columns.values() if c.type == "<i8"}


def split(slots: Slots, layout: Layout) -> Iterator[tuple[int, Rows]]:
    """Usable slots by engine and kind; those of each are in order."""
    head = slot_head(slots)
    kinds, engines = head["kind"], head["engine"]
    of_one = kinds.min() == kinds.max() and engines.min() == engines.max() if len(slots) else False
    if of_one:
        yield int(engines[0]), Rows(np.ascontiguousarray(slots), layout, _NAMES[int(kinds[0])])
        return
    both = engines.astype(np.int64) << 8 | kinds
    for one in np.unique(both).tolist():
        yield one >> 8, Rows(slots[both == one], layout, _NAMES[one & 255])
