"""The ledger: every event of every KV block, with the request it happened for and a digest of what the block holds.

vLLM's hash of a block covers all tokens up to the block's end; the digest is a keyed hash of that hash, with a key that
is made anew for each recording: equal digests are equal prefixes within one recording, and nothing can be told from
them outside it. No token is looked at.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import itertools
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvhook.core import native
from kvhook.core_schema import BLOCK_EVENT_BYTES, BLOCK_EVENTS, BLOCKS, BLOCKS_KINDS
from kvhook.facts import without_names
from kvhook.faults import contained
from kvhook.recording.recorder import NEEDS_CRC, process_facts
from kvhook.ring.layout import FIELDS_AT, Layout, make_layout
from kvhook.ring.place import RING_SUFFIXES, process_start
from kvhook.ring.writer import RingWriter

if TYPE_CHECKING:
    from kvhook.adapters.core import Core
    from kvhook.core.state import CoreState
    from kvhook.core.taps import Taps
    from kvhook.ring.writer import Publish

STREAM = "blocks"
SLOT_BYTES = 1024

ALLOCATE, HIT, CACHE, FREE, EVICT, RESET = range(len(BLOCK_EVENTS))
_EVENT = struct.Struct("<IiIiIIQ")
_NOBODY, _NOWHERE = -1, -1


def ledger_layout() -> Layout:
    """The slots of a ledger."""
    return make_layout({}, BLOCKS_KINDS)._replace(slot_bytes=SLOT_BYTES)


def events_per_slot(layout: Layout) -> int:
    """How many events fit into a slot."""
    return (layout.slot_bytes - FIELDS_AT - 8 * len(layout.columns["blocks"])) // BLOCK_EVENT_BYTES


def _taking(group: Any) -> list[str]:
    """The methods by which the manager of one KV cache group takes new blocks. Their number grows with the releases."""
    return [name for name in dir(group) if name.startswith("allocate")]


class LedgerRing:
    """The ring that the ledger of one engine core goes to; the spool drains it like any other.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, number: int, directory: Path, slots: int, facts: dict[str, Any]) -> None:
        self.number = number
        pid = os.getpid()
        for attempt in itertools.count():  # somebody else's file may have the name
            again = f"-{attempt}" if attempt else ""
            path = directory / f"{pid}-{process_start(pid)}-{facts['serial']}{again}{RING_SUFFIXES[STREAM]}"
            meta = {"engine": number, "stream": STREAM, "ring": str(path), **process_facts(), **facts}
            self.meta: dict[str, Any] = without_names(meta)
            with contextlib.suppress(FileExistsError):
                self.ring = RingWriter(path, ledger_layout(), slots, self.meta, crc=NEEDS_CRC)
                break

    def close(self) -> None:
        """Mark the ring closed. Closing twice is fine."""
        self.ring.close()


class Ledger:
    """Writes down what happens to the blocks of one pool.

    Args:
        core: what was found on the scheduler.
        layout: of the ring's slots.
        publish: stores a packed record.
        engine: number of the core in its process.
        key: of the digests.
        number_of: the number of a request.
        failed: is told of errors.
        state: says which step it is, and for which request the block manager works.
    """

    def __init__(
        self,
        core: Core,
        layout: Layout,
        publish: Publish,
        engine: int,
        key: bytes,
        number_of: Callable[[Any], int],
        failed: Callable[[BaseException], None],
        state: CoreState,
    ) -> None:
        self._core, self._publish, self._engine, self._key = core, publish, engine, key
        self._number_of, self._failed = number_of, failed
        self._null = getattr(core.pool, "null_block", None)
        self._hash_of = core.reads["hash_of_block"]
        self._several = len(core.facts["kv_groups"]) > 1
        self._most = events_per_slot(layout)
        self._pack = layout.struct_of("blocks", tail=f"{self._most * BLOCK_EVENT_BYTES}s").pack
        #: what has been written down since `flush`
        self.events: list[bytes] = []
        self._n = 0
        self._state = state
        #: block -> group and digest of what it holds
        self._known: dict[int, tuple[int, int]] = {}
        group_of = core.reads["group_of_block"]
        for block in core.pool.blocks:
            if block.block_hash is not None:
                self._known[block.block_id] = (group_of(block.block_hash), self._digest(block.block_hash))
        #: with several groups: the one that works, and block -> the group that took it last
        self._group, self._taken = 0, dict[int, int]()

    def tap(self, taps: Taps) -> None:
        """Put the writing in place, over the counting."""
        pool, manager = self._core.pool, self._core.manager
        on_behalf = native.tap(self._state, "behalf") or self._on_behalf
        taps.put(manager, "allocate_slots", on_behalf)
        taps.put(manager, "free", on_behalf)
        taps.put(pool, "get_new_blocks", self._on_get_new_blocks)
        taps.put(pool, "touch", self._on_touch)
        taps.put(pool, "free_blocks", self._on_free)
        taps.put(pool, "cache_full_blocks", self._on_cache)
        taps.put(pool, "_maybe_evict_cached_block", self._on_evict)
        taps.put(pool, "reset_prefix_cache", self._on_reset)
        if self._several:
            for group in manager.coordinator.single_type_managers:
                for name in _taking(group):
                    taps.put(group, name, self._in_group(group.kv_cache_group_id))

    def flush(self) -> None:
        """Publish what has been written down since the last call: at the end of a step."""
        events, most = self.events, self._most
        for first in range(0, len(events), most):
            some = events[first : first + most]
            n = self._n
            self._n = self._publish(n, self._pack(n, BLOCKS, self._engine, len(some), b"".join(some)))
        events.clear()

    def _write(self, event: int, block: int, index: int = _NOWHERE, request: int | None = None) -> None:
        known = self._known.get(block)
        # what a block holds is known from when it is cached on, its group from when it is taken
        group, digest = (self._taken.get(block, 0), 0) if known is None else known
        if request is None:
            behalf = self._state.behalf
            request = _NOBODY if behalf is None else self._number_of(behalf)
        self.events.append(_EVENT.pack(self._state.step, request, block, index, event, group, digest))

    def _digest(self, key: Any) -> int:
        content = self._hash_of(key)
        content = content if isinstance(content, bytes) else repr(content).encode()
        return int.from_bytes(hashlib.blake2b(content, digest_size=8, key=self._key).digest(), "little") or 1

    def _flat(self, blocks: Any) -> list[Any]:
        """The blocks of a list, or of a list for each group, without the null block."""
        flat: list[Any] = []
        for block in blocks:
            if isinstance(block, (list, tuple)):
                flat += self._flat(block)
            elif block is not self._null:
                flat.append(block)
        return flat

    def _on_behalf(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Remember for which request the manager works."""
        state = self._state

        def method(request: Any, *args: Any, **kwargs: Any) -> Any:
            state.behalf = request
            try:
                return original(request, *args, **kwargs)
            finally:
                state.behalf = None

        return method

    def _in_group(self, group: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Remember which KV cache group takes blocks."""

        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            def method(*args: Any, **kwargs: Any) -> Any:
                before, self._group = self._group, group
                try:
                    return original(*args, **kwargs)
                finally:
                    self._group = before

            return method

        return make

    def _on_get_new_blocks(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def get_new_blocks(*args: Any, **kwargs: Any) -> Any:
            blocks = original(*args, **kwargs)
            with contained(self._failed):
                if self._several:
                    self._taken.update((block.block_id, self._group) for block in blocks)
                for block in blocks:
                    self._write(ALLOCATE, block.block_id)
            return blocks

        return get_new_blocks

    def _on_touch(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def touch(blocks: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(blocks, *args, **kwargs)
            with contained(self._failed):
                for block in self._flat(blocks):
                    self._write(HIT, block.block_id)
            return result

        return touch

    def _on_free(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def free_blocks(ordered_blocks: Any, *args: Any, **kwargs: Any) -> Any:
            blocks = list(ordered_blocks)
            result = original(blocks, *args, **kwargs)
            with contained(self._failed):
                for block in blocks:
                    if not block.ref_cnt and block is not self._null:
                        self._write(FREE, block.block_id)
            return result

        return free_blocks

    def _on_cache(self, original: Callable[..., Any]) -> Callable[..., Any]:
        names = list(inspect.signature(original).parameters)
        at = {name: names.index(name) for name in ("blocks", "num_cached_blocks", "num_full_blocks")}
        group_at = names.index("kv_cache_group_id") if "kv_cache_group_id" in names else -1
        request_at = names.index("request")

        def cache_full_blocks(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            with contained(self._failed):
                blocks, first, end = (kwargs[n] if n in kwargs else args[i] for n, i in at.items())
                group = kwargs.get("kv_cache_group_id", args[group_at] if 0 <= group_at < len(args) else 0)
                # with asynchronous scheduling generated blocks are cached outside of allocate_slots
                number = self._number_of(kwargs["request"] if "request" in kwargs else args[request_at])
                for index in range(first, end):
                    block = blocks[index]
                    if block.block_hash is not None and block is not self._null:
                        self._known[block.block_id] = (group, self._digest(block.block_hash))
                        self._write(CACHE, block.block_id, index, number)
            return result

        return cache_full_blocks

    def _on_evict(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def _maybe_evict_cached_block(block: Any, *args: Any, **kwargs: Any) -> Any:
            gone = original(block, *args, **kwargs)
            if gone:
                with contained(self._failed):
                    self._write(EVICT, block.block_id)
                    self._known.pop(block.block_id, None)
            return gone

        return _maybe_evict_cached_block

    def _on_reset(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def reset_prefix_cache(*args: Any, **kwargs: Any) -> Any:
            done = original(*args, **kwargs)
            if done:
                with contained(self._failed):
                    for block in list(self._known):
                        self._write(RESET, block)
                    self._known.clear()
            return done

        return reset_prefix_cache
