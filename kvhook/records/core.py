"""The tables of engine cores: their steps, requests, preemptions and look-ups, as arrays.

An engine core has a ring and trace files of its own, beside those of the front end, because it may run in another
process. What its trace does not hold yet is read from the ring.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kvhook.core_schema import (
    BLOCK_EVENT_FIELDS,
    BLOCK_EVENT_TIMES,
    BLOCK_EVENTS,
    BLOCKS,
    BLOCKS_KINDS,
    CORE_ENUMS,
    CORE_KINDS,
    CORE_UNIX,
)
from kvhook.records.block_lives import block_lives, prefixes
from kvhook.records.claims import claim, claimed_by
from kvhook.records.clock import Clock, readings_in
from kvhook.records.columns import Table
from kvhook.records.engines import Engines
from kvhook.records.part import Interval, inside
from kvhook.records.sources import SlotSource, usable
from kvhook.ring.layout import FIELDS_AT
from kvhook.ring.slots import fields_of, slot_head
from kvhook.schema import META

if TYPE_CHECKING:
    from kvhook.ring.layout import Layout
    from kvhook.ring.slots import Slots

#: Why a run has no engine core's records, where nothing better is known.
NO_CORE = (
    "no engine core was recorded: kvhook was installed with core='off', after the engine was made, or the engine core "
    "ran where kvhook could not follow it"
)
#: The same of a part of a run.
NONE_OF_THEM = "the engine cores of this run belong to other engines of it"


class CoreRecords:
    """What the engine cores of one run did.

    Args:
        cores: the sources of each core, oldest first.
        ledgers: the same for their ledgers of blocks, in the same order; empty ones where there is none.
        name: what to call the run in errors.
        absent: why there is none, if there is none.

    Attributes:
        facts: what is known of each core: its block size, number of KV blocks, process and so on. ``of_engines`` are
            the numbers of the run's engines that it may be the core of, where that is known.
        absent: column -> why it is not known.
        origins: of each core what it was read from, so that it can be known again.
        lost_besides: records of cores of which there is no file at all.
    """

    def __init__(
        self,
        cores: Sequence[Sequence[SlotSource]],
        name: str,
        absent: str = "",
        ledgers: Sequence[Sequence[SlotSource]] = (),
    ) -> None:
        self.name = name
        self._cores = [list(sources) for sources in cores]
        self._ledgers = [list(sources) for sources in ledgers] or [[] for _ in self._cores]
        self._intervals: list[Interval] | None = None
        self._steps_of_part: dict[int, Any] = {}
        self.facts: list[dict[str, Any]] = []
        self.origins: list[Hashable] = [object() for _ in self._cores]
        self.lost_of: list[int] = []
        self.lost_besides = 0
        self.why_none = "" if self._cores else absent or NO_CORE
        self._clocks: list[Clock] = []
        for sources in self._cores:
            engines = Engines(kinds=CORE_KINDS)
            for source in sources:
                engines.scan(source)
            headers = [source.header for source in sources if source.header is not None]
            self.facts.append(next(iter(engines.facts()), {}))
            told = {h.monotonic_ns: h.realtime_ns for h in headers} | readings_in(self.facts[-1].get("clocks"))
            self._clocks.append(Clock(told | engines.events.clocks))
            self.lost_of.append(sum(engines.lost_and_dropped()))
        self.absent = _absent(self.facts)

    def __len__(self) -> int:
        return len(self._cores)

    @property
    def lost(self) -> int:
        """Records of all kinds that are not there."""
        return sum(self.lost_of) + self.lost_besides

    # ---- some of them, or those of several runs --------------------------------------------------------------------

    def only(self, wanted: Sequence[int], why_none: str = "") -> CoreRecords:
        """Some of these cores; they are numbered anew.

        Args:
            wanted: their numbers.
            why_none: what to say if there is none.
        """
        some = copy.copy(self)
        for name in _OF_EACH:
            of = getattr(self, name)
            setattr(some, name, [of[core] for core in wanted])
        some.absent = _absent(some.facts)
        some._steps_of_part = {}  # noqa: SLF001 (of this very class)
        some.why_none = "" if wanted else self.why_none or why_none
        return some

    def of_engines(self, engines: Iterable[int]) -> CoreRecords:
        """The cores that may be those of some engines of the run."""
        kept = set(engines)
        of = map(claimed_by, self.facts)
        mine = [core for core, theirs in enumerate(of) if theirs is None or theirs & kept]
        return self if len(mine) == len(self) else self.only(mine, NONE_OF_THEM)

    @classmethod
    def together(cls, runs: Sequence[CoreRecords], name: str) -> CoreRecords:
        """The cores of several runs, one after the other; one that several of them have is there once.

        Args:
            runs: whose ``of_engines`` count the engines of all of them.
            name: what to call all in errors.
        """
        every = cls([], name, "; ".join(dict.fromkeys(run.why_none for run in runs if run.why_none)))
        place: dict[Hashable, int] = {}
        for run in runs:
            for core, origin in enumerate(run.origins):
                if origin in place:
                    first = every.facts[place[origin]]
                    both = claimed_by(first), claimed_by(run.facts[core])
                    claim(first, None if None in both else frozenset().union(*filter(None, both)))
                    continue
                place[origin] = len(every.facts)
                for of in _OF_EACH:
                    getattr(every, of).append(getattr(run, of)[core])
        every.absent = _absent(every.facts)
        every.why_none = "" if len(every) else every.why_none
        return every

    def go_over(self, take: Callable[[int, Slots, Layout, int], None]) -> None:
        """Hand on all records, some thousands at a time, in the order of each core.

        Args:
            take: is given the number of the core, usable slots, their layout, and the core's block size (0 if that is
                not known).
        """
        for number, sources in enumerate(self._cores):
            size = int(self.facts[number].get("block_size") or 0)
            for source in sources:
                for slots in source.chunks():
                    slots = slots[usable(slots, CORE_KINDS)]
                    take(number, self._of_part(number, slots, source.layout), source.layout, size)

    def told(self) -> dict[str, Any]:
        """What an export says of the cores beside their tables."""
        facts = [f | {"clocks": clock.readings} for f, clock in zip(self.facts, self._clocks, strict=True)]
        return {"facts": facts, "absent": self.absent, "lost": self.lost}

    def part(self, intervals: Sequence[Interval]) -> CoreRecords:
        """Only the steps that ended in one of these intervals of the monotonic clock, and what belongs to them."""
        part = copy.copy(self)
        part._intervals = list(intervals)  # noqa: SLF001 (of this very class)
        part._steps_of_part = {}  # noqa: SLF001
        return part

    def _of_part(self, core: int, slots: Slots, layout: Layout) -> Slots:
        """Those of some usable slots of a core that belong to steps of this part."""
        if self._intervals is None:
            return slots
        keep = np.zeros(len(slots), np.bool_)
        kinds = slot_head(slots)["kind"]
        for kind, (code, _) in CORE_KINDS.items():
            at = (kinds == code).nonzero()[0]
            if code != META and len(at):
                fields = fields_of(slots[at], layout.columns[kind])
                number = fields["finished_step" if kind == "core_request" else "step"]
                keep[at] = np.isin(number, self._chosen(core))
        return slots[keep]

    def _chosen(self, core: int) -> Any:
        """The numbers of the steps of a core that are in this part."""
        if core not in self._steps_of_part:
            whole = copy.copy(self)
            whole._intervals = None  # noqa: SLF001 (of this very class)
            steps = whole.steps(core)
            ended = np.where(steps["t_end_ns"] >= 0, steps["t_end_ns"], steps["t_scheduled_ns"])
            self._steps_of_part[core] = steps["step"][inside(ended, self._intervals or ())]
        return self._steps_of_part[core]

    def _only_chosen(self, table: Table) -> Table:
        """The rows of a table that belong to steps of this part."""
        if self._intervals is None:
            return table
        keep = np.zeros(len(table), np.bool_)
        for core in np.unique(table["core"]).tolist():
            mine = table["core"] == core
            keep[mine] = np.isin(table["step"][mine], self._chosen(core))
        return table[keep]

    def steps(self, core: int | None = None) -> Table:
        """One row per step of an engine core: the columns of `kvhook.core_schema.CORE_STEP_FIELDS`, and ``core``."""
        return self._gather("core_step", core)

    def requests(self, core: int | None = None) -> Table:
        """One row per request that has ended: the columns of `kvhook.core_schema.CORE_REQUEST_FIELDS`, and ``core``."""
        return self._gather("core_request", core)

    def preemptions(self, core: int | None = None) -> Table:
        """One row per preemption: the columns of `kvhook.core_schema.PREEMPTION_FIELDS`, and ``core``."""
        return self._gather("preemption", core)

    def lookups(self, core: int | None = None) -> Table:
        """One row per request that was scheduled with what it had found in the prefix cache: the columns of
        `kvhook.core_schema.LOOKUP_FIELDS`, and ``core``."""
        return self._gather("lookup", core)

    def blocks(self, core: int | None = None) -> Table:
        """One row per event of a KV block, in order: the columns of `kvhook.core_schema.BLOCK_EVENT_FIELDS`, and
        ``core``. Empty unless kvhook was installed with ``core="blocks"``."""
        types = [("core", "<i8")] + [
            (n, "U10" if n == "event" else _SEEN_AS.get(k, k)) for n, k, _ in BLOCK_EVENT_FIELDS
        ]
        types += [(name, "<i8") for name in BLOCK_EVENT_TIMES]
        parts = [np.empty(0, types)]
        for number in range(len(self._ledgers)) if core is None else [core]:
            times = None
            for raw in self.block_events(number):
                times = self._scheduled(number) if times is None else times
                part = np.empty(len(raw), types)
                part["core"] = number
                part["t_ns"] = _at_steps(times, raw["step"])
                part["t_unix_ns"] = self._clocks[number].unix(part["t_ns"])
                for name, _, _ in BLOCK_EVENT_FIELDS:
                    part[name] = _text(raw[name], BLOCK_EVENTS) if name == "event" else raw[name]
                parts.append(part)
        return self._only_chosen(np.concatenate(parts))

    def _scheduled(self, core: int) -> Table:
        """Of each step of a core its number and when it had been scheduled, in the order of the numbers."""
        out = [np.empty(0, [("step", "<i8"), ("t_scheduled_ns", "<i8")])]
        out += [table[["step", "t_scheduled_ns"]] for table in self.chunks("core_step", core)]
        steps: Table = np.concatenate(out)
        in_order: Table = steps[np.argsort(steps["step"], kind="stable")]
        return in_order

    def block_events(self, core: int) -> Iterator[Table]:
        """The events of one core as they are stored, piece by piece: `BLOCK_EVENT_FIELDS`, with the events' codes."""
        stored = np.dtype([(name, kind) for name, kind, _ in BLOCK_EVENT_FIELDS])
        for source in self._ledgers[core] if core < len(self._ledgers) else ():
            columns = source.layout.columns["blocks"]
            first = FIELDS_AT + 8 * len(columns)
            most = (source.layout.slot_bytes - first) // stored.itemsize
            for slots in source.chunks():
                slots = slots[usable(slots, BLOCKS_KINDS)]
                slots = slots[slot_head(slots)["kind"] == BLOCKS]
                count = np.clip(fields_of(slots, columns)["count"], 0, most)
                inside = np.arange(most) < count[:, None]
                yield np.ascontiguousarray(slots[:, first : first + most * stored.itemsize]).view(stored)[inside]

    def num_block_events(self) -> int:
        """How many events the ledgers of blocks hold."""
        return sum(len(events) for core in range(len(self)) for events in self.block_events(core))

    def lost_in_ledgers(self) -> int:
        """Slots of the ledgers of blocks that are not there; each held up to some thirty events."""
        lost = 0
        for sources in self._ledgers:
            engines = Engines(kinds=BLOCKS_KINDS)
            for source in sources:
                engines.scan(source)
            lost += sum(engines.lost_and_dropped())
        return lost

    def block_lives(self, core: int | None = None) -> Table:
        """One row per content that a KV block held, from being cached to being evicted: the columns of
        `kvhook.records.block_lives.BLOCK_LIFE_FIELDS`. Empty unless kvhook was installed with ``core="blocks"``."""
        return block_lives(self.blocks(core))

    def prefixes(self, core: int | None = None) -> Table:
        """The tree of prefixes of whole blocks and how many requests begin with each: the columns of
        `kvhook.records.block_lives.PREFIX_FIELDS`. Empty unless kvhook was installed with ``core="blocks"``."""
        return prefixes(self.blocks(core), self.block_sizes())

    def block_sizes(self) -> dict[int, int]:
        """KV cache group -> tokens of a block; 0 where that is not known, or where the cores differ."""
        each = [_sizes(facts) for facts in self.facts] or [{0: 0}]
        return {g: size if all(one.get(g) == size for one in each) else 0 for g, size in each[0].items()}

    def clock_ahead(self, core: int) -> int:
        """What to add to the monotonic times of a core to have them on the clock of the first one: not 0 if they ran
        on two machines, or a reboot lay between."""
        first, here = (self._clocks[n].readings for n in (0, core))
        if not first or not here:
            return 0
        ahead = (here[0][1] - here[0][0]) - (first[0][1] - first[0][0])
        return ahead if abs(ahead) > _SAME_CLOCK_NS else 0

    def chunks(self, kind: str, core: int) -> Iterator[Table]:
        """Rows of one kind as they are stored, some thousands at a time: a long run has more than memory
        may hold. Values of `kvhook.core_schema.CORE_ENUMS` are codes."""
        for slots, layout in self._slots(core, CORE_KINDS[kind][0]):
            yield fields_of(slots, layout.columns[kind])

    def _gather(self, kind: str, core: int | None) -> Table:
        return np.concatenate([np.empty(0, self._types(kind)), *self.pieces(kind, core)])

    def pieces(self, kind: str, core: int | None = None) -> Iterator[Table]:
        """The rows of `steps`, `requests`, `preemptions` or `lookups`, some thousands at a time: a long run has more
        than memory may hold. `kind` is a name of `kvhook.core_schema.CORE_KINDS`."""
        code, fields = CORE_KINDS[kind]
        types = self._types(kind)
        unix = {clock: name for name, clock in CORE_UNIX[kind].items()}
        for number in range(len(self._cores)) if core is None else [core]:
            for slots, layout in self._slots(number, code):
                raw = fields_of(slots, layout.columns[kind])
                part = np.empty(len(slots), types)
                part["core"] = number
                for field in fields:
                    if field.name in self.absent:
                        continue
                    stored = raw[field.name] if field.name in (raw.dtype.names or ()) else np.full(len(slots), -1)
                    part[field.name] = _text(stored, CORE_ENUMS[field.name]) if field.type == "enum" else stored
                    if field.name in unix:
                        part[unix[field.name]] = self._clocks[number].unix(stored)
                yield part

    def _types(self, kind: str) -> list[tuple[str, str]]:
        unix = {clock: name for name, clock in CORE_UNIX[kind].items()}
        types = [("core", "<i8")]
        for field in CORE_KINDS[kind][1]:
            if field.name not in self.absent:
                types.append((field.name, "U20" if field.type == "enum" else f"<{field.type}"))
                types += [(unix[field.name], "<i8")] if field.name in unix else []
        return types

    def _slots(self, core: int, code: int) -> Iterator[tuple[Slots, Layout]]:
        for source in self._cores[core]:
            for slots in source.chunks():
                slots = self._of_part(core, slots[usable(slots, CORE_KINDS)], source.layout)
                yield slots[slot_head(slots)["kind"] == code], source.layout


#: Adjustments of a machine's clock are smaller, the times at which two machines were started lie further apart.
_SAME_CLOCK_NS = 10**9


def _sizes(facts: Mapping[str, Any]) -> dict[int, int]:
    groups = facts.get("kv_groups") or []
    if len(groups) < 2:
        return {0: int(facts.get("block_size") or 0)}
    return {number: int(group.get("block_size") or 0) for number, group in enumerate(groups)}


#: What there is one of for each core.
_OF_EACH = ("_cores", "_ledgers", "facts", "_clocks", "origins", "lost_of")


def _absent(cores: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Column -> why not every core has it."""
    kinds = [reasons for facts in cores for reasons in facts.get("absent", {}).values()]
    return {name: why for reasons in kinds for name, why in reasons.items()}


def _at_steps(times: Table, steps: Any) -> Any:
    """When some steps had been scheduled; -1 where that is not known."""
    if not len(times):
        return np.full(len(steps), -1)
    place = np.minimum(np.searchsorted(times["step"], steps), len(times) - 1)
    return np.where(times["step"][place] == steps, times["t_scheduled_ns"][place], -1)


def _text(codes: Any, names: Sequence[str]) -> Any:
    """Codes as text; one that is newer than this kvhook stays a number."""
    known = np.array(names)
    fits = (codes >= 0) & (codes < len(known))
    return np.where(fits, known[np.where(fits, codes, 0)], codes.astype("U20"))


#: Numbers of blocks and steps are given signed, so that they can be subtracted.
_SEEN_AS = {"<u4": "<i8", "<i4": "<i8"}
