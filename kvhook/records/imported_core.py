"""The tables of engine cores that were exported, as slots again: everything that reads engine cores reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from kvhook.core_schema import BLOCK_EVENT_FIELDS, BLOCK_EVENTS, BLOCKS, BLOCKS_KINDS, CORE_ENUMS, CORE_KINDS
from kvhook.facts import clean_facts
from kvhook.records.core import CoreRecords
from kvhook.records.imported import Columns, SlotsInMemory, known_values
from kvhook.ring.layout import FIELDS_AT, Layout, make_layout
from kvhook.ring.slots import fields_of, slot_head
from kvhook.schema import GAUGE, TIME

if TYPE_CHECKING:
    from kvhook.ring.slots import Slots

#: Events of blocks that are put into a slot.
_EVENTS = 30
#: Facts that were counted from slots, and that are wrong for slots that were made anew.
_COUNTED = ("records_published", "records_overrun", "records_unwritten")


def as_cores(tables: Mapping[str, Columns], told: Any, name: str) -> CoreRecords | None:
    """What engine cores recorded, out of an exported run; None if it holds nothing of them.

    Args:
        tables: kind of record -> column -> values, as `kvhook.export.contents.TABLES` names the kinds.
        told: what the export says of the cores: their ``facts``, columns that are ``absent``, and records that were
            ``lost``.
        name: what to call the run.
    """
    if "core_step" not in tables or "core" not in tables["core_step"]:
        return None
    tables = {kind: columns for kind, columns in tables.items() if "core" in columns}
    told = told if isinstance(told, dict) else {}
    raw = told.get("facts")
    facts = [clean_facts(one) for one in raw] if isinstance(raw, list) else []
    numbers = [core for columns in tables.values() for core in np.unique(_ints(columns["core"])).tolist()]
    count = max((len(facts), *(n + 1 for n in numbers if 0 <= n < 1 << 16)))
    facts += [{} for _ in range(count - len(facts))]
    cores = [[_source(tables, core, facts[core])] for core in range(count)]
    ledgers = [[_ledger(tables["blocks"], core)] if "blocks" in tables else [] for core in range(count)]
    records = CoreRecords(cores, name, ledgers=ledgers)
    lost = told.get("lost")
    if count:
        records.lost_of = [lost if type(lost) is int else 0] + [0] * (count - 1)
    return records


def _ints(values: Any) -> Any:
    return np.asarray(known_values(values, -1)).astype(np.int64)


def _source(tables: Mapping[str, Columns], core: int, facts: Mapping[str, Any]) -> SlotsInMemory:
    live = {
        kind: tuple(f for f in fields if f.name in tables.get(kind, ()))
        for kind, (_, fields) in CORE_KINDS.items()
        if kind in tables
    }
    layout = make_layout(live, CORE_KINDS)
    parts, keys = [], []
    for kind in live:
        slots, steps = _slots(layout, kind, tables[kind], core)
        parts.append(slots)
        # what belongs to a step stands before the step's own record
        keys.append(2 * steps + (kind == "core_step"))
    slots = np.concatenate(parts)[np.argsort(np.concatenate(keys), kind="stable")]
    _number(slots)
    source = SlotsInMemory(layout, slots)
    source.engines = {0: {k: v for k, v in facts.items() if k not in _COUNTED} | {"engine": 0}}
    return source


def _slots(layout: Layout, kind: str, columns: Columns, core: int) -> tuple[Slots, Any]:
    """The slots of one kind of a core's records, and the step that each belongs to."""
    mine = np.flatnonzero(_ints(columns["core"]) == core)
    code, fields = CORE_KINDS[kind]
    slots = np.zeros((len(mine), layout.slot_bytes), np.uint8)
    slot_head(slots)["kind"] = code
    into = fields_of(slots, layout.columns[kind])
    for field in fields:
        if field.name not in (into.dtype.names or ()):
            continue
        values = _rows(columns[field.name], mine)
        if field.type == "enum":
            into[field.name] = [_code(text, CORE_ENUMS[field.name]) for text in values]
        else:
            into[field.name] = known_values(values, -1 if field.role in (GAUGE, TIME) else 0)
    return slots, into["finished_step" if kind == "core_request" else "step"].astype(np.int64)


def _rows(values: Any, rows: Any) -> Any:
    return values[rows] if isinstance(values, np.ndarray) else [values[row] for row in rows.tolist()]


def _code(text: Any, names: tuple[str, ...]) -> int:
    if text in names:
        return names.index(text)
    return int(text) if isinstance(text, str) and text.lstrip("-").isdecimal() else -1


def _number(slots: Slots) -> None:
    head = slot_head(slots)
    head["n"] = np.arange(len(slots))
    head["stamp"] = (2 * head["n"] + 2).astype(np.uint64)


def _ledger(columns: Columns, core: int) -> SlotsInMemory:
    """The events of a core's blocks, as many as fit into each slot."""
    stored = np.dtype([(name, kind) for name, kind, _ in BLOCK_EVENT_FIELDS])
    mine = np.flatnonzero(_ints(columns["core"]) == core)
    events = np.zeros(len(mine), stored)
    for name in stored.names or ():
        values = _rows(columns[name], mine)
        if name == "event":
            events[name] = [_code(text, BLOCK_EVENTS) for text in values]
        else:
            events[name] = np.asarray(values).astype(stored[name])
    heads = make_layout({}, BLOCKS_KINDS).columns
    first = FIELDS_AT + 8 * len(heads["blocks"])
    layout = Layout(-(-(first + _EVENTS * stored.itemsize) // 64) * 64, heads)
    slots = np.zeros((-(-len(events) // _EVENTS), layout.slot_bytes), np.uint8)
    slot_head(slots)["kind"] = BLOCKS
    counts = fields_of(slots, heads["blocks"])
    for number, slot in enumerate(slots):
        some = events[number * _EVENTS : (number + 1) * _EVENTS]
        counts["count"][number] = len(some)
        slot[first : first + some.nbytes] = np.frombuffer(some.tobytes(), np.uint8)
    _number(slots)
    return SlotsInMemory(layout, slots)
