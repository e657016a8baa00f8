"""``kvhook recover``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from kvhook.cli.common import add_dir, file_name
from kvhook.ring.directory import directories

if TYPE_CHECKING:
    from kvhook.discovery.recovery import Recovered


class RecoverCommand:
    """Complete the traces of processes that were killed with what only their rings still hold.

    A trace is written once a second or more often. What was recorded after the last time is in the ring alone. A
    file is replaced when the new one is whole, or left alone with --out. Without --out the files that its engine cores
    have written beside it (FILE.core*.kvh, FILE.blocks*.kvh) are completed too. FILE may also be a folder of traces,
    or a pattern.

    Example:
      $ kvhook recover run.kvh
      run.kvh: engine 0: 37 records added
    """

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument("trace", metavar="FILE.kvh", type=file_name, nargs="+", help="a trace")
        parser.add_argument("--out", type=file_name, metavar="OUT.kvh", help="write here instead; with one FILE only")
        add_dir(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Do it, and say what was added."""
        from kvhook.discovery.recovery import recover
        from kvhook.errors import KvhookError
        from kvhook.places import several
        from kvhook.records.whose import may_be_beside
        from kvhook.text.afterwards import short

        traces = [path for given in args.trace for path in several(given) or [given]]
        if args.out is not None and len(traces) > 1:
            raise KvhookError(f"--out takes one file, and these are {len(traces)}: leave it away, or name one")
        places, failed, done = directories(args.dir), 0, set[Path]()
        for trace in traces:
            for path in [trace, *(may_be_beside(trace) if args.out is None else [])]:
                if path in done:
                    continue
                done.add(path)
                try:
                    _say(path, recover(path, places, args.out))
                except KvhookError as error:
                    if traces == [path]:
                        raise
                    failed += path in traces
                    print(f"{short(path)}: {error}")
        return 1 if failed else 0


def _say(path: Path, done: Recovered) -> None:
    from kvhook.records.core_files import is_of_core
    from kvhook.text.afterwards import short

    if done.reason:
        print(f"{short(path)}: {done.reason}")
    for engine, added in sorted(done.added.items()):
        lost = done.missing.get(engine, 0)
        gap = f"; {lost:,} before them had been overwritten, and are lost" if lost else ""
        of = "core" if is_of_core(path) else "engine"
        print(f"{short(done.path)}: {of} {engine}: {added:,} records added{gap}")
