"""Single times to first token and inter-token latencies as a table: which step they came in, their value, how often.

Together with the steps it is all that a summary is made of.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from kvhook.records.columns import Table, has
from kvhook.records.tables import MAX_LATENCIES, Records
from kvhook.ring.layout import FIELDS_AT, Layout
from kvhook.ring.slots import fields_of, slot_head
from kvhook.schema import STEP, VALUE_SERIES, VALUES

if TYPE_CHECKING:
    from kvhook.ring.slots import Slots

#: Name and type of its columns: the value occurred `count` times in the step.
TYPES = [("engine", "<i8"), ("step", "<i8"), ("series", "U20"), ("value", "<f8"), ("count", "<i8")]
_PREFIXES = ("ttft", "itl")


def latency_rows(records: Records, slots: Slots, layout: Layout) -> Iterator[Table]:
    """The rows that some slots of a run tell.

    A step of which all values are equal, or that has two, tells them itself; see `Records.latencies`.
    """
    kinds = slot_head(slots)["kind"]
    steps = records.table(slots[kinds == STEP], layout, "step")
    for series, prefix in zip(VALUE_SERIES, _PREFIXES, strict=True):
        if has(steps, f"{prefix}_count") and has(steps, f"{prefix}_min") and has(steps, f"{prefix}_max"):
            yield from _told_by_steps(steps, series, prefix)
    yield _lists(slots[kinds == VALUES], layout)


def _told_by_steps(steps: Table, series: str, prefix: str) -> Iterator[Table]:
    count, low, high = (steps[f"{prefix}_{what}"] for what in ("count", "min", "max"))
    there = (count > 0) & (count < MAX_LATENCIES)
    equal, pair = there & (low == high), there & (count == 2) & (low != high)
    for mask, value, times in ((equal, low, count), (pair, low, None), (pair, high, None)):
        out = np.zeros(int(mask.sum()), TYPES)
        out["engine"], out["step"], out["series"] = steps["engine"][mask], steps["step"][mask], series
        out["value"], out["count"] = value[mask], 1 if times is None else times[mask]
        yield out


def _lists(slots: Slots, layout: Layout) -> Table:
    fields = fields_of(slots, layout.columns["values"])
    room = layout.values_per_slot
    first = FIELDS_AT + 8 * len(layout.columns["values"])
    lists = np.ascontiguousarray(slots[:, first : first + 8 * room]).view("<f8")
    known = (fields["series"] >= 0) & (fields["series"] < len(VALUE_SERIES))
    inside = (np.arange(room) < np.clip(fields["count"], 0, room)[:, None]) & known[:, None]
    row = inside.nonzero()[0]
    out = np.zeros(len(row), TYPES)
    out["engine"], out["step"] = slot_head(slots)["engine"][row], fields["step"][row]
    out["series"] = np.array(VALUE_SERIES)[fields["series"][row]] if len(row) else ""
    out["value"], out["count"] = lists[inside], 1
    return out
