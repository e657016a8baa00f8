"""kvhook's own format: the slots as they are, with what is known of the engines; or the same compressed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kvhook.errors import ExportError
from kvhook.files import Opener
from kvhook.records.tables import Records
from kvhook.ring import frames
from kvhook.ring.trace_file import pack_meta, trace_header

if TYPE_CHECKING:
    from kvhook.ring.layout import Layout
    from kvhook.ring.slots import Slots


def write(records: Records, path: Path, opener: Opener) -> None:
    """One file that `kvhook.open` gives back unchanged.

    Raises:
        ExportError: the run holds engines with different columns (of two vLLM versions, say).
    """
    _write(records, path, opener, compress=False)


def write_compressed(records: Records, path: Path, opener: Opener) -> None:
    """The same in a tenth of the space, see `kvhook.ring.frames`.

    Raises:
        ExportError: the run holds engines with different columns.
    """
    _write(records, path, opener, compress=True)


def _write(records: Records, path: Path, opener: Opener, *, compress: bool) -> None:
    file = opener(path)
    layout: Layout | None = None
    waiting: list[Slots] = []
    for slots in _all(records, path):
        if layout is None:
            layout = records.sources[0].layout
            facts = {"kvhook": records.meta["kvhook"], "vllm": records.meta["vllm"]}
            file.write(trace_header(layout, facts, like=records.header, closed=True, compressed=compress))
        if not compress:
            file.write(slots.tobytes())
            continue
        waiting.append(slots)
        if sum(map(len, waiting)) >= frames.SLOTS:
            together = np.concatenate(waiting)
            whole = len(together) // frames.SLOTS * frames.SLOTS
            for at in range(0, whole, frames.SLOTS):
                file.write(frames.pack_frame(together[at : at + frames.SLOTS]))
            waiting = [together[whole:]]
    if layout is None:
        raise ExportError(f"{path}: nothing has been recorded yet")
    if waiting and len(last := np.concatenate(waiting)):
        file.write(frames.pack_frame(last))


def _all(records: Records, path: Path) -> Iterator[Slots]:
    """What is known of the engines, then every usable slot."""
    first = None
    for slots, layout in records.chunks():
        if first is None:
            first = layout
            for engine in records.meta["engines"]:
                yield pack_meta(layout, engine["engine"], engine)
            events = records.engines.events
            if events and records.meta["engines"]:
                yield pack_meta(layout, records.meta["engines"][0]["engine"], {"events": events.as_list()})
        if layout != first:
            raise ExportError(f"{path}: these engines have different columns; a .kvh file holds one set. Use .jsonl")
        yield slots
