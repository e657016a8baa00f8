"""kvhook's own format: the slots as they are, with what is known of the engines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING

from kvhook.errors import ExportError
from kvhook.ring.trace_file import pack_meta, trace_header

if TYPE_CHECKING:
    from kvhook.trace import Trace


def write(trace: Trace, path: Path, opener: Callable[[Path], IO[bytes]]) -> None:
    """One file that `kvhook.open` gives back unchanged.

    Raises:
        ExportError: the trace holds engines with different columns (of two vLLM versions, say).
    """
    file = opener(path)
    first = None
    for slots, layout in trace.chunks():
        if first is None:
            first = layout
            facts = {"kvhook": trace.meta["kvhook"], "vllm": trace.meta["vllm"]}
            file.write(trace_header(layout, facts, like=trace.header, closed=True))
            for engine in trace.meta["engines"]:
                file.write(pack_meta(layout, engine["engine"], engine).tobytes())
        if layout != first:
            raise ExportError(f"{path}: these engines have different columns; a .kvh file holds one set. Use .jsonl")
        file.write(slots.tobytes())
    if first is None:
        raise ExportError(f"{path}: nothing has been recorded yet")
