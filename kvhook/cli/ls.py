"""``kvhook ls``."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from kvhook.cli.common import add_dir, age, size
from kvhook.discovery.rings import Ring, find_rings
from kvhook.ring.directory import ALL_STREAMS, directories

_COLUMNS = ("PID", "ENGINE", "STATE", "MODEL", "PROGRAM", "STEPS", "AGE", "SIZE")
_RIGHT = frozenset({"PID", "ENGINE", "STEPS", "AGE", "SIZE"})
_WIDEST = 32


class LsCommand:
    """List the rings of this user: what records, or has recorded, on this machine.

    A ring is the file in which a process keeps the last steps of an engine; "core 0" and "blocks 0" are those of what
    is recorded inside an engine core, which may have a process of its own. Its state is alive (the process runs), dead
    (the process ended without closing it: see kvhook autopsy) or closed (it ended cleanly).

    Example:
      $ kvhook ls
       PID  ENGINE  STATE   MODEL       PROGRAM   STEPS    AGE    SIZE
      4736       0  alive   tiny-llama  serve.py     56  3 min  3.7 MB

      in /dev/shm/kvhook-1000
    """

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument("--json", action="store_true", help="print one JSON array, with paths")
        add_dir(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Print them."""
        places = directories(args.dir)
        rings = find_rings(places, ALL_STREAMS)
        print(json.dumps([as_dict(r) for r in rings], indent=2) if args.json else as_text(rings, time.time()))
        if not rings and not args.json:
            print(f"(looked in {', '.join(map(str, places)) or 'no directory'})")
        return 0


def as_dict(ring: Ring) -> dict[str, Any]:
    """A ring for ``--json``: times in seconds since 1970, null where they are not known."""
    return ring._asdict() | {"path": str(ring.path), "started": ring.started or None, "last": ring.last or None}


def as_text(rings: list[Ring], now: float) -> str:
    """A table, the newest first, with where the files are below it."""
    if not rings:
        return "There are no rings. A program makes one with kvhook.install() when its LLM(...) starts."
    rows = [_COLUMNS, *(_cells(r, now) for r in rings)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines = [
        "  ".join(
            text.rjust(width) if name in _RIGHT else text.ljust(width)
            for text, width, name in zip(row, widths, _COLUMNS, strict=True)
        ).rstrip()
        for row in rows
    ]
    lines += [f"{r.path.name}: {r.problem}" for r in rings if r.problem]
    lines += [
        f"{r.pid}: in another container, where it cannot be seen from here whether it runs"
        for r in rings
        if r.elsewhere
    ]
    lines.append("")
    lines += [f"in {place}" for place in dict.fromkeys(str(r.path.parent) for r in rings)]
    return "\n".join(lines)


def _cells(ring: Ring, now: float) -> tuple[str, ...]:
    return (
        str(ring.pid or "?"),
        f"{ring.stream} {ring.engine}".strip(),
        ring.state,
        _short(ring.model) or "-",
        _short(ring.program) or "-",
        "-" if ring.steps is None else f"{ring.steps:,}",
        age(now - ring.started) if ring.started else "-",
        size(ring.bytes),
    )


def _short(text: str) -> str:
    """The end of a long name: of a path that is the part that says something."""
    return text if len(text) <= _WIDEST else f"...{text[3 - _WIDEST :]}"
