"""Tables that were exported, as slots again: everything that reads a trace reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvhook.errors import TraceFormatError
from kvhook.facts import NEEDED_COLUMNS, clean_facts, clean_run
from kvhook.records import engine_events
from kvhook.records.clock import readings_in
from kvhook.records.engines import Engines
from kvhook.records.events import from_meta, scope_events
from kvhook.records.sources import SlotSource
from kvhook.ring.layout import FIELDS_AT, Header, Layout, make_layout
from kvhook.ring.slots import fields_of, slot_head
from kvhook.schema import FINISH_REASONS, KINDS, NAMES, REQUEST, STEP, VALUE_SERIES, VALUES, blank

if TYPE_CHECKING:
    from kvhook.ring.slots import Slots

Ints = npt.NDArray[np.int64]
#: Column -> its values, None (or a mask) where one is not known.
Columns = Mapping[str, Any]

#: A file may hold so many single latencies, or so many for each of its rows: no allocation follows a number in it
#: further than this.
_FEWEST_VALUES, _VALUES_PER_ROW = 1 << 20, 256
#: Facts of ``meta`` that follow from the slots, and that are wrong for slots that were made anew.
_COUNTED = ("records_published", "records_overrun", "records_unwritten")
#: Facts of ``meta`` that are taken over as they are.
_KEPT = ("records_lost", "records_dropped", "damaged", "faults", "hook_call_ns", "why_no_steps", "part", "not_closed")


class Exported(NamedTuple):
    """What a file, or several beside each other, hold.

    Attributes:
        meta: as the run had it.
        tables: kind of record, as in `kvhook.export.contents.TABLES` -> name of the column -> values; numbers that are
            not known are None or NaN.
        cores: what is said of the engine cores.
    """

    meta: dict[str, Any]
    tables: Mapping[str, Columns]
    cores: Any = None


def as_source(exported: Exported, name: str) -> tuple[SlotSource, Engines, dict[str, Any]]:
    """The slots of an exported run, what is known of its engines, and of the run.

    Raises:
        TraceFormatError: a column is missing without which no trace can be read.
    """
    steps, requests, latencies = (exported.tables.get(kind, {}) for kind in ("step", "request", "latency"))
    for column in ("engine", *sorted(NEEDED_COLUMNS["step"])):
        if column not in steps:
            raise TraceFormatError(f"{name} holds no steps that kvhook has exported: it has no column {column}")
    if "engine" not in requests:
        # a file of lines says nothing of the columns of a table without rows
        absent = {
            name
            for e in exported.meta.get("engines", ())
            for name in clean_facts(e).get("absent", {}).get("request", {})
        }
        requests = {f.name: np.empty(0) for f in KINDS["request"][1] if f.name not in absent} | {"engine": np.empty(0)}
    live = {
        kind: tuple(f for f in fields if f.name in columns)
        for (kind, (_, fields)), columns in zip(KINDS.items(), (steps, requests), strict=False)
    }
    layout = make_layout(live)
    codes = _names(requests)
    parts = [
        _slots(layout, "step", STEP, steps, {}),
        _slots(layout, "request", REQUEST, requests, codes) if requests.get("engine") is not None else None,
        _values(layout, steps, latencies),
    ]
    slots = _in_order([part for part in parts if part is not None], layout)
    engines = Engines()
    for facts in exported.meta.get("engines", ()):
        facts = {k: v for k, v in clean_facts(facts).items() if k not in _COUNTED}
        if isinstance(number := facts.get("engine"), int):
            engines.add_facts(number, facts)
    scopes = [event for scope in from_meta(exported.meta.get("scopes")) for event in scope_events(scope)]
    names = [["name", column, code, text] for column, texts in codes.items() for text, code in texts.items()]
    done = [engine_events.as_cells(event) for event in engine_events.from_meta(exported.meta.get("engine_events"))]
    engines.events.take([*scopes, *names, *_clock_events(exported.meta), *done])
    source = SlotsInMemory(layout, slots)
    engines.begin(source)
    engines.take(slots)
    return source, engines, clean_run(exported.meta, _KEPT)


def _clock_events(meta: Mapping[str, Any]) -> list[list[Any]]:
    """When both clocks were read."""
    # an export of an older kvhook has one reading
    pairs: list[tuple[Any, Any]] = [*readings_in(meta.get("clocks")).items()]
    pairs = pairs or [(meta.get("monotonic_ns"), meta.get("realtime_ns"))]
    return [["clock", *pair] for pair in pairs]


class SlotsInMemory(SlotSource):
    """Slots that were made here, or brought here from another process."""

    def __init__(self, layout: Layout, slots: Slots, header: Header | None = None) -> None:
        super().__init__(layout, header)
        self._slots = slots

    def chunks(self) -> Any:
        """All of them, some thousands at a time."""
        for at in range(0, len(self._slots), 1 << 14):
            yield self._slots[at : at + (1 << 14)]


def _names(requests: Columns) -> dict[str, dict[str, int]]:
    """Column of names -> its texts and the codes that they get."""
    return {
        column: {text: code for code, text in enumerate(dict.fromkeys(filter(None, requests[column])))}
        for column in NAMES
        if column in requests
    }


def _slots(layout: Layout, kind: str, code: int, columns: Columns, names: Mapping[str, Mapping[str, int]]) -> Slots:
    count = len(columns["engine"])
    slots = np.zeros((count, layout.slot_bytes), np.uint8)
    head = slot_head(slots)
    head["kind"], head["engine"] = code, columns["engine"]
    fields = fields_of(slots, layout.columns[kind])
    blanks = {f.name: float(blank(f)) for f in KINDS[kind][1]}
    for column in layout.columns[kind]:
        values = columns[column.name]
        if column.name in names:
            values = [names[column.name].get(text or "", -1) for text in values]
        elif column.enum:
            values = [_reason(text) for text in values]
        else:
            values = known_values(values, blanks[column.name])
        fields[column.name] = values
    return slots


def known_values(values: Any, instead: float) -> Any:
    """Numbers, with what stands for one that is not known in the place of None and NaN."""
    array = np.asarray(values)
    if array.dtype == object:
        missing = np.array([value is None for value in array.tolist()], np.bool_)
        whole = all(type(value) is int for value in array[~missing].tolist())
        filled = np.where(missing, 0, array).astype(np.int64 if whole and instead == instead else np.float64)
        filled[missing] = instead
        return filled
    if array.dtype.kind == "f" and instead == instead:
        return np.where(np.isnan(array), instead, array)
    return array


def _reason(text: Any) -> int:
    if text in FINISH_REASONS:
        return FINISH_REASONS.index(text)
    return int(text) if isinstance(text, str) and text.lstrip("-").isdecimal() else -1


def _values(layout: Layout, steps: Columns, latencies: Columns) -> Slots | None:
    """The single latencies that the steps do not tell by themselves."""
    if "series" not in latencies or not len(latencies["series"]):
        return None
    room, first = layout.values_per_slot, FIELDS_AT + 8 * len(layout.columns["values"])
    groups: dict[tuple[int, int, int], list[float]] = {}
    rows = zip(
        *(np.asarray(latencies[c]).tolist() for c in ("engine", "step", "series", "value", "count")), strict=True
    )
    room_left = max(_FEWEST_VALUES, _VALUES_PER_ROW * len(latencies["series"]))
    for engine, step, series, value, count in rows:
        if series in VALUE_SERIES:
            room_left -= count
            if count < 0 or room_left < 0:
                raise ValueError(f"{count} equal latencies in one row")
            groups.setdefault((engine, step, VALUE_SERIES.index(series)), []).extend([value] * count)
    out = []
    for (engine, step, series), values in groups.items():
        # one or two values, and equal ones, are what the step's own record tells
        if len(values) < 3 or min(values) == max(values):
            continue
        for at in range(0, len(values), room):
            some = values[at : at + room]
            slot = np.zeros((1, layout.slot_bytes), np.uint8)
            head, fields = slot_head(slot), fields_of(slot, layout.columns["values"])
            head["kind"], head["engine"] = VALUES, engine
            fields["step"], fields["series"], fields["count"] = step, series, len(some)
            slot[0, first : first + 8 * len(some)] = np.frombuffer(np.array(some, "<f8").tobytes(), np.uint8)
            out.append(slot)
    return np.concatenate(out) if out else None


def _in_order(parts: Sequence[Slots], layout: Layout) -> Slots:
    """Slots of all kinds as a run has them: what belongs to a step before the step's own record."""
    slots = np.concatenate(parts)
    head = slot_head(slots)
    steps = np.zeros(len(slots), np.int64)
    for kind, code in (("step", STEP), ("request", REQUEST), ("values", VALUES)):
        at = (head["kind"] == code).nonzero()[0]
        if len(at):
            steps[at] = fields_of(slots[at], layout.columns[kind])["step"]
    is_step = head["kind"] == STEP
    keys = head["engine"].astype(np.int64) << 40 | np.maximum(steps, 0)
    own = keys[is_step]
    order = np.argsort(own, kind="stable")
    place = np.searchsorted(own, keys, sorter=order)
    place = np.append(order, len(own))[np.minimum(place, len(own))]
    slots = slots[np.argsort(2 * place + is_step, kind="stable")]
    head = slot_head(slots)
    for engine in np.unique(head["engine"]).tolist():
        mine = head["engine"] == engine
        head["n"][mine] = np.arange(int(mine.sum()))
    head["stamp"] = (2 * head["n"] + 2).astype(np.uint64)
    return slots
