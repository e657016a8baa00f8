"""Rows as plain Python values, for the text formats."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kvhook.ring.reader import slot_head
from kvhook.schema import GAUGE, KINDS

if TYPE_CHECKING:
    from kvhook.trace import Trace

Row = dict[str, Any]


def rows(trace: Trace) -> Iterator[tuple[str, list[Row]]]:
    """Kind (``"step"`` or ``"request"``) and rows, in the order of the trace, some thousands at a time.

    What is not known is None: a state in a step that brought no stats, a value vLLM did not give.
    """
    gauges = {kind: {f.name for f in fields if f.role == GAUGE} for kind, (_, fields) in KINDS.items()}
    for slots, layout in trace.chunks():
        kinds = slot_head(slots)["kind"]
        for kind in ("request", "step"):
            table = trace.table(slots[kinds == KINDS[kind][0]], layout, kind)
            if not len(table):
                continue
            names = table.dtype.names or ()
            columns = [_plain(table[name].tolist(), name in gauges[kind]) for name in names]
            yield kind, [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def _plain(values: list[Any], gauge: bool) -> list[Any]:
    return [None if v != v or (gauge and v == -1) else v for v in values]
