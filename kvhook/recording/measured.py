"""A run that is added up without its warm-up, while it goes on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from kvhook.analysis.totals import Totals
from kvhook.records.part import Interval, inside
from kvhook.ring.slots import fields_of, slot_head
from kvhook.schema import META, REQUEST, STEP, VALUES

if TYPE_CHECKING:
    from kvhook.records.part import Bools
    from kvhook.ring.layout import Layout
    from kvhook.ring.slots import Slots

#: The kinds of records that belong to a step, by their codes.
_KINDS = {STEP: "step", REQUEST: "request", VALUES: "values"}


class Measured:
    """The totals of the steps that are no warm-up.

    Until the first warm-up begins these are the totals of all. From then on, records are sorted by their steps:
    requests and single latencies come before their step's own record, and wait for it where a chunk ends in between.

    Args:
        whole: the totals of all steps, which somebody else keeps.
        warmups: gives from when to when the session was warming up so far.

    Attributes:
        left_out: steps that were left out.
    """

    def __init__(self, whole: Totals, warmups: Callable[[], Sequence[Interval]]) -> None:
        self._whole, self._warmups = whole, warmups
        self._own: Totals | None = None
        self._waiting: list[Slots] = []
        self.left_out = 0

    @property
    def totals(self) -> Totals:
        """The totals without warm-up."""
        return self._whole if self._own is None else self._own

    def take(self, slots: Slots, layout: Layout) -> None:
        """Take in usable slots. Called before the totals of all steps take them in."""
        # asked after the slots were read: a step that is among them ended after its scope had begun
        warmups = self._warmups()
        if not warmups:
            return
        if self._own is None:
            self._own = copy.deepcopy(self._whole)
        if self._waiting:
            slots = np.concatenate([*self._waiting, slots])
            self._waiting = []
        keep = self._sort(slots, layout, warmups)
        self._own.take(slots[keep], layout)

    def _sort(self, slots: Slots, layout: Layout, warmups: Sequence[Interval]) -> Bools:
        """Which slots count; those whose step is not here yet are kept for the next time."""
        head = slot_head(slots)
        kinds, engines = head["kind"], head["engine"]
        keep = kinds != META
        waiting = np.zeros(len(slots), np.bool_)
        for engine in np.unique(engines).tolist():
            mine = engines == engine
            at = (mine & (kinds == STEP)).nonzero()[0]
            fields = fields_of(slots[at], layout.columns["step"])
            warm = inside(fields["t_end_ns"], warmups)
            self.left_out += int(np.count_nonzero(warm))
            out, last = fields["step"][warm], int(fields["step"].max(initial=-1))
            for code, kind in _KINDS.items():
                rows = (mine & (kinds == code)).nonzero()[0]
                steps = fields_of(slots[rows], layout.columns[kind])["step"]
                keep[rows[np.isin(steps, out)]] = False
                waiting[rows[steps > last]] = True
        if waiting.any():
            self._waiting = [slots[waiting].copy()]
        counted: Bools = keep & ~waiting
        return counted
