"""What is known of the engines behind some slots: their facts, and which of their records are there."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kvhook.facts import clean_facts
from kvhook.records.events import Events
from kvhook.records.sources import SlotSource, usable
from kvhook.ring.layout import BODY_AT, FIELDS_AT, Kinds, make_layout
from kvhook.ring.slots import fields_of, slot_head
from kvhook.schema import KINDS, META

if TYPE_CHECKING:
    from kvhook.ring.slots import Slots


class Engines:
    """The engines of one run, found by a pass over the heads of its slots.

    Args:
        after: engine -> the last record that was left out of the slots on purpose; see `LaterSlots`. Engines without
            a later record are left out too. None: nothing was left out.
        kinds: the kinds of records that there can be.

    Attributes:
        damaged: slots that hold no usable record.
        events: what happened beside the steps: scopes, labels, clock readings.
    """

    def __init__(self, after: Mapping[int, int] | None = None, kinds: Kinds = KINDS) -> None:
        self.damaged = 0
        self.events = Events()
        self._kinds = kinds
        self._after = after
        self._facts: dict[int, dict[str, Any]] = {}
        self._numbers: dict[int, tuple[int, int, int]] = {}  # engine -> lowest n, highest n, count
        # of the source that is being taken in
        self._layout = make_layout({})
        self._pieces: dict[int, list[bytes]] = {}

    # ---- taking in -------------------------------------------------------------------------------------------------

    def scan(self, source: SlotSource) -> None:
        """Take in the facts and the record numbers of a source."""
        self.begin(source)
        for slots in source.chunks():
            self.take(slots)
        self.damaged += source.in_holes

    def begin(self, source: SlotSource) -> None:
        """Begin with a source, of which the slots are then taken in."""
        self._pieces = {}
        self._layout = source.layout
        self._facts |= source.engines

    def take(self, slots: Slots) -> Slots:
        """Take in slots of the source that was begun; gives those that are usable."""
        good = usable(slots, self._kinds)
        if not good.all():
            self.damaged += int(len(slots) - good.sum())
            slots = slots[good]
        head = slot_head(slots)
        is_meta = head["kind"] == META
        engines, n = head["engine"], head["n"]
        if is_meta.any():
            for i in is_meta.nonzero()[0]:
                self._take_piece(slots[i], int(engines[i]))
            engines, n = engines[~is_meta], n[~is_meta]
        self._count(engines, n)
        return slots

    def add(self, later: Engines) -> None:
        """Take in what a later part of the run has told; that stays as it is."""
        self.damaged += later.damaged
        self.events.add(later.events)
        for engine, facts in later._facts.items():
            self.add_facts(engine, facts)
        for engine, span in later._numbers.items():
            self._count_of(engine, *span)

    def add_facts(self, engine: int, facts: Mapping[str, Any]) -> None:
        """Take in more facts about an engine; they replace earlier ones of the same name."""
        self._facts[engine] = self._facts.get(engine, {}) | dict(facts)

    def leave_out_idle(self) -> None:
        """Of a later part of a run: leave out the engines that did nothing in it."""
        if self._after is not None:
            self._facts = {engine: facts for engine, facts in self._facts.items() if engine in self._numbers}

    def only(self, numbers: Iterable[int]) -> Engines:
        """Some of these engines, with all that is known of them."""
        part = Engines(kinds=self._kinds)
        part.damaged, part.events = self.damaged, self.events
        for engine in numbers:
            part._facts[engine] = self._facts.get(engine, {})
            if engine in self._numbers:
                part._numbers[engine] = self._numbers[engine]
        return part

    def _count(self, engines: npt.NDArray[np.int32], n: npt.NDArray[np.int64]) -> None:
        """Add to the lowest number, the highest, and the count of records of each engine."""
        if not len(engines):
            return
        if engines[0] == engines.min() == engines.max():
            self._count_of(int(engines[0]), int(n.min()), int(n.max()), len(n))
            return
        order = np.argsort(engines, kind="stable")
        different, first = np.unique(engines[order], return_index=True)
        n = n[order]
        spans = zip(
            different.tolist(),
            np.minimum.reduceat(n, first).tolist(),
            np.maximum.reduceat(n, first).tolist(),
            np.diff(first, append=len(n)).tolist(),
            strict=True,
        )
        for span in spans:
            self._count_of(*span)

    def _count_of(self, engine: int, lowest: int, highest: int, count: int) -> None:
        low, high, before = self._numbers.get(engine, (lowest, highest, 0))
        self._numbers[engine] = min(low, lowest), max(high, highest), before + count

    def _take_piece(self, slot: Slots, engine: int) -> None:
        """Take in a META record: one piece of an engine's facts."""
        layout, pieces = self._layout, self._pieces
        if zlib.crc32(slot[BODY_AT:].tobytes()) != int(slot_head(slot[None])["crc"][0]):
            self.damaged += 1
            return
        fields = fields_of(slot[None], layout.columns["meta"])[0]
        begin = FIELDS_AT + 8 * len(layout.columns["meta"])
        parts = pieces.setdefault(engine, [])
        if fields["part"] != len(parts):
            parts.clear()
            if fields["part"]:
                return
        parts.append(slot[begin : begin + int(np.clip(fields["nbytes"], 0, layout.meta_bytes_per_slot))].tobytes())
        if len(parts) == fields["parts"]:
            try:
                facts = clean_facts(json.loads(b"".join(parts)))
                self.events.take(facts.pop("events", None))
                self.add_facts(engine, facts)
            except (ValueError, RecursionError):
                self.damaged += len(parts)
            parts.clear()

    # ---- asking ----------------------------------------------------------------------------------------------------

    def facts(self) -> list[dict[str, Any]]:
        """The facts of each engine, in the order of their numbers; ``engine`` is the number."""
        numbers = sorted(self._facts.keys() | self._numbers.keys())
        return [{"engine": e} | self._facts.get(e, {}) | {"engine": e} for e in numbers]

    def last_record(self, engine: int) -> int:
        """The highest number of an engine's records, -1 if there are none."""
        return self._numbers.get(engine, (0, -1, 0))[1]

    def count(self, engine: int, fact: str) -> int:
        """A count from an engine's facts, 0 if it is not among them."""
        return int(self._facts.get(engine, {}).get(fact) or 0)

    @property
    def records(self) -> int:
        """Records of all engines."""
        return sum(count for _, _, count in self._numbers.values())

    def lost_and_dropped(self) -> tuple[int, int]:
        """Records that are missing: those that were never read or written, and those that fell out of a bounded
        history."""
        lost = dropped = 0
        for engine in sorted(self._facts.keys() | self._numbers.keys()):
            missing, before = self._missing(engine)
            counted = sum(self.count(engine, fact) for fact in ("records_overrun", "records_unwritten"))
            # what is missing before the first record fell out of a bounded history, unless it was never written
            gone = min(missing, max(missing - before, counted))
            lost, dropped = lost + gone, dropped + missing - gone
        return lost, dropped

    def _missing(self, engine: int) -> tuple[int, int]:
        """How many records of an engine are not here, and how many of those come before the first that is."""
        published = self.count(engine, "records_published")
        earlier = 0 if self._after is None else self._after.get(engine, -1) + 1
        low, high, count = self._numbers.get(engine, (published, published - 1, 0))
        missing = max(0, max(high + 1, published) - count)
        return max(0, missing - earlier), max(0, low - earlier)

    def absent(self, kind: str) -> dict[str, str]:
        """Columns that no engine fills, with the first engine's reason."""
        missing = [facts.get("absent", {}).get(kind, {}) for facts in self._facts.values()]
        if not missing:
            return {}
        return {name: why for name, why in missing[0].items() if all(name in m for m in missing)}
