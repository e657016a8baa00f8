"""What child processes of this one have recorded."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from kvhook.errors import TraceFormatError
from kvhook.ring.place import RING_SUFFIX
from kvhook.ring.trace_file import TRACE_SUFFIX, header_of


def files_of_children(ring_dir: Path, trace: Path | None) -> list[Path]:
    """The traces that children of this process wrote beside its own, else their rings; empty if there are none.

    Args:
        ring_dir: where this process has its rings, and its children theirs.
        trace: the trace file that was asked for, if one was.
    """
    here = os.getpid()
    rings = []
    for path in sorted(ring_dir.glob(f"*{RING_SUFFIX}")):
        try:
            if header_of(path, follow_links=False).meta.get("parent_pid") == here:
                rings.append(path)
        except (OSError, TraceFormatError):
            continue  # it has just been removed, or is somebody else's
    if trace is None or not rings:
        return rings
    pids = {path.name.split("-")[0] for path in rings}
    beside = sorted(trace.parent.glob(f"{glob.escape(trace.stem)}-pid*{TRACE_SUFFIX}"))
    return [path for path in beside if path.stem.rsplit("-pid", 1)[-1].split("-")[0] in pids] or rings
