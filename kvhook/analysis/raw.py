"""Raw slots of one kind and one engine, column by column. A column is copied out when it is first asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvhook.core_schema import CORE_KINDS
from kvhook.ring.layout import Column, Kinds, Layout
from kvhook.ring.slots import slot_head
from kvhook.schema import KINDS, blank

if TYPE_CHECKING:
    from kvhook.ring.slots import Slots

_BLANKS = {name: {f.name: float(blank(f)) for f in fields} for name, (_, fields) in (KINDS | CORE_KINDS).items()}


class Rows:
    """Slots of one kind. A column that they do not hold reads as blank.

    Args:
        slots: whole slots, one after the other in memory, also of other kinds.
        at: which of them are meant; None: all.
        layout: of the slots.
        kind: what those that are meant hold.
    """

    def __init__(self, slots: Slots, at: npt.NDArray[np.int64] | None, layout: Layout, kind: str) -> None:
        self.kind, self.layout = kind, layout
        self._slots, self._at = slots, at
        self._blanks = _BLANKS[kind]
        self._words = slots.view("<i8")
        self._columns = {c.name: c for c in layout.columns[kind]}
        self._read: dict[str, npt.NDArray[np.int64]] = {}

    def __len__(self) -> int:
        return len(self._words) if self._at is None else len(self._at)

    def has(self, name: str) -> bool:
        """Whether the slots hold this column."""
        return name in self._columns

    def last(self) -> Rows:
        """A copy of the last one."""
        at = -1 if self._at is None else self._at[-1]
        return Rows(self._slots[at][None].copy(), None, self.layout, self.kind)

    @property
    def slots(self) -> Slots:
        """The slots themselves, without those of other kinds."""
        return self._slots if self._at is None else self._slots[self._at]

    def ints(self, name: str) -> npt.NDArray[np.int64]:
        """A column of whole numbers."""
        if name not in self._read:
            column = self._columns.get(name)
            if column is None:
                self._read[name] = np.full(len(self), int(self._blanks.get(name, 0)))
            else:
                self._read[name] = self._column(column)
        return self._read[name]

    def floats(self, name: str, at: npt.NDArray[np.int64] | None = None) -> npt.NDArray[np.float64]:
        """A column of floats: all of it, or of the rows `at`."""
        column = self._columns.get(name)
        if column is None:
            return np.full(len(self) if at is None else len(at), self._blanks.get(name, 0.0))
        return self._column(column, at).view("<f8")

    def sums(self) -> dict[str, int]:
        """The sum of every column of whole numbers that is there."""
        total = self._words.sum(axis=0)
        if self._at is not None:  # to add up the few others and take them off needs no copy of the many
            others = np.ones(len(self._words), np.bool_)
            others[self._at] = False
            total -= self._words[others].sum(axis=0)
        return {c.name: int(total[c.offset // 8]) for c in self._columns.values() if c.type == "<i8"}

    def _column(self, column: Column, at: npt.NDArray[np.int64] | None = None) -> npt.NDArray[np.int64]:
        words = self._words[:, column.offset // 8]
        if at is None:
            at = self._at
        elif self._at is not None:
            at = self._at[at]
        return np.ascontiguousarray(words) if at is None else words[at]


def split(slots: Slots, layout: Layout, of: Kinds = KINDS) -> Iterator[tuple[int, Rows]]:
    """Usable slots by engine and kind; those of each are in order."""
    if not len(slots):
        return
    slots = np.ascontiguousarray(slots)
    head = slot_head(slots)
    kinds, engines = np.ascontiguousarray(head["kind"]), np.ascontiguousarray(head["engine"])
    found = set(np.unique(engines).tolist()) if engines.min() != engines.max() else {int(engines[0])}
    for engine in sorted(found):
        mine = engines == engine if len(found) > 1 else None
        for name, (code, _) in of.items():
            at = (kinds == code if mine is None else mine & (kinds == code)).nonzero()[0]
            if len(at):
                yield engine, Rows(slots, None if len(at) == len(slots) else at, layout, name)
