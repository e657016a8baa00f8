"""kvhook's own format: the slots as they are, with what is known of the engines."""

from __future__ import annotations

from pathlib import Path

from kvhook.errors import ExportError
from kvhook.files import Opener
from kvhook.records.tables import Records
from kvhook.ring.trace_file import pack_meta, trace_header


def write(records: Records, path: Path, opener: Opener) -> None:
    """One file that `kvhook.open` gives back unchanged.

    Raises:
        ExportError: the run holds engines with different columns (of two vLLM versions, say).
    """
    file = opener(path)
    first = None
    for slots, layout in records.chunks():
        if first is None:
            first = layout
            facts = {"kvhook": records.meta["kvhook"], "vllm": records.meta["vllm"]}
            file.write(trace_header(layout, facts, like=records.header, closed=True))
            for engine in records.meta["engines"]:
                file.write(pack_meta(layout, engine["engine"], engine).tobytes())
        if layout != first:
            raise ExportError(f"{path}: these engines have different columns; a .kvh file holds one set. Use .jsonl")
        file.write(slots.tobytes())
    if first is None:
        raise ExportError(f"{path}: nothing has been recorded yet")
