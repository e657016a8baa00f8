"""``kvhook autopsy``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from kvhook.cli.common import add_dir, positive
from kvhook.discovery.cleaning import history_of
from kvhook.discovery.rings import ALIVE, CLOSED_RING, DEAD, choose, find_rings, parse_pid
from kvhook.errors import KvhookError
from kvhook.ring.directory import directories
from kvhook.text.bar import shows_blocks
from kvhook.text.steps import StepLines

if TYPE_CHECKING:
    from kvhook.records.core import CoreRecords
    from kvhook.ring.layout import Header
    from kvhook.trace import Trace


class AutopsyCommand:
    """Show the last steps of a run that ended, and what changed before the end.

    Reads the ring that the process left behind: by default the newest of a process that was killed. Rings are kept
    until kvhook clean, or until there are too many.

    Example:
      $ kvhook autopsy
      The process ended without closing its ring: it was killed (kill -9, out of memory), crashed, or left by os._exit.

      What changed before the end
        KV cache usage rose from a median of 40.0 % to 99.4 % in the last step
        the queue grew: 15 requests waited in the last step, a median of 0 before
      ...
    """

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument("pid", metavar="PID", nargs="?", help="a process, or a file: a ring or a .kvh trace")
        parser.add_argument("--engine", type=positive, metavar="N", help="number of the engine in its process")
        parser.add_argument("-n", "--steps", type=positive, default=20, metavar="N", help="list so many steps")
        parser.add_argument("--json", action="store_true", help="print one JSON object")
        add_dir(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Print it."""
        from kvhook.analysis.autopsy import examine
        from kvhook.ring.layout import CLOSED
        from kvhook.ring.place import history_root
        from kvhook.ring.reader import writer_alive
        from kvhook.text.autopsy import as_text, sentences
        from kvhook.trace import open_trace

        path = self._path(args)
        trace = open_trace(path)
        header = trace.header
        if header is None:
            raise KvhookError(
                f"{path} was exported: it does not say how its process ended. kvhook summary {path} reads it"
            )
        ended = "closed" if header.state == CLOSED else "alive" if writer_alive(header) else "killed"
        result = examine(trace, ended, args.steps, args.engine, _cores(trace, header))
        if args.json:
            plain = result.as_dict() | {"changes": sentences(result.changes)}
            print(json.dumps({"path": str(path), "pid": header.pid, **plain}, indent=2))
            return 0
        print(_heading(header, path))
        print(as_text(result, StepLines(header.monotonic_ns, header.realtime_ns, ascii_only=not shows_blocks())))
        if folder := history_of(header.pid, header.process_start, history_root()):
            print(f"\nThe whole run, not only what the ring holds, is in the .kvh files in {folder}")
        return 0

    def _path(self, args: argparse.Namespace) -> Path:
        which = parse_pid(args.pid) if args.pid else None
        if isinstance(which, Path):
            return which
        ring = choose(find_rings(directories(args.dir)), which, args.engine, (DEAD, CLOSED_RING))
        if ring.state == ALIVE:
            raise KvhookError(
                f"process {ring.pid} still runs, and nobody else has left a ring: kvhook tail {ring.pid} shows it live"
                if which is None and args.engine is None
                else f"process {ring.pid} still runs: kvhook tail {ring.pid} shows it live"
            )
        return ring.path


def _cores(trace: Trace, header: Header) -> CoreRecords:
    """What the engine cores of the run recorded: beside the trace, in the temporary history of a ring's process, or
    what is left in the rings beside that ring."""
    from kvhook.discovery.cleaning import histories_of
    from kvhook.records.core_files import files_of, open_cores, open_rings
    from kvhook.ring.directory import ring_files
    from kvhook.ring.place import history_root

    found = trace.cores()
    if len(found) or not header.capacity:
        return found
    folders = histories_of(header.pid, header.process_start, history_root())
    files = [path for folder in folders for path in files_of(folder / "history")]
    if files:
        return open_cores(files, trace.name)
    return open_rings(ring_files([Path(trace.name).parent], ("core",)), trace.name, header.pid)


def _heading(header: Header, path: Path) -> str:
    facts = header.meta
    program = f" ({facts['program']})" if facts.get("program") else ""
    return f"process {header.pid}{program}, engine {facts.get('engine') or 0}: {path}"
