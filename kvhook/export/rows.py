"""Rows as plain Python values, for the text formats."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kvhook.ring.reader import slot_head
from kvhook.schema import COUNTED, FULL_ONLY, GAUGE, KINDS, LEVELS

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from kvhook.trace import Trace

Row = dict[str, Any]

_GAUGES = {kind: {f.name for f in fields if f.role == GAUGE} for kind, (_, fields) in KINDS.items()}


def rows(trace: Trace) -> Iterator[tuple[str, list[Row]]]:
    """Kind (``"step"`` or ``"request"``) and rows, in the order of the trace, some thousands at a time.

    What is not known is None: a state in a step that brought no stats, a value vLLM did not give, a count that was
    not made at a lower level.
    """
    for slots, layout in trace.chunks():
        kinds = slot_head(slots)["kind"]
        for kind in ("request", "step"):
            table = trace.table(slots[kinds == KINDS[kind][0]], layout, kind)
            if len(table):
                yield kind, as_rows(table, kind)


def as_rows(table: npt.NDArray[np.void], kind: str) -> list[Row]:
    """A table as `Trace.steps` and `Trace.requests` give it, as dictionaries; what is not known is None."""
    names = table.dtype.names or ()
    columns = [_plain(table[name].tolist(), name in _GAUGES[kind]) for name in names]
    for name, unknown in _not_recorded(table, kind).items():
        i = names.index(name)
        columns[i] = [None if u else v for u, v in zip(unknown, columns[i], strict=True)]
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def _not_recorded(table: npt.NDArray[np.void], kind: str) -> dict[str, list[bool]]:
    """Column -> in which rows it was not recorded, in a run that stepped down from level full."""
    names = table.dtype.names or ()
    if kind != "step" or "level" not in names or not table["level"].any():
        return {}
    light = (table["level"] > 0).tolist()
    passed_over = ((table["level"] == LEVELS.index("sparse")) & (table["has_iteration_stats"] == 0)).tolist()
    unknown = dict.fromkeys(FULL_ONLY, light) | dict.fromkeys(COUNTED, passed_over)
    return {name: rows for name, rows in unknown.items() if name in names}


def _plain(values: list[Any], gauge: bool) -> list[Any]:
    return [None if v != v or (gauge and v == -1) else v for v in values]
