"""``kvhook recover``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from kvhook.cli.common import add_dir, file_name
from kvhook.discovery.rings import directories

if TYPE_CHECKING:
    from kvhook.discovery.recovery import Recovered


class RecoverCommand:
    """Complete the trace of a process that was killed with what only its ring still holds.

    A trace is written once a second or more often. What was recorded after the last time is in the ring alone. The
    file is replaced when the new one is whole, or left alone with --out. Without --out the files that its engine cores
    have written beside it (FILE.core*.kvh, FILE.blocks*.kvh) are completed too.

    Example:
      $ kvhook recover run.kvh
      run.kvh: engine 0: 37 records added
    """

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument("trace", metavar="FILE.kvh", type=file_name, help="the trace")
        parser.add_argument("--out", type=file_name, metavar="OUT.kvh", help="write here instead")
        add_dir(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Do it, and say what was added."""
        from kvhook.discovery.recovery import recover
        from kvhook.errors import KvhookError
        from kvhook.records.whose import may_be_beside
        from kvhook.text.afterwards import short

        places = directories(args.dir)
        _say(args.trace, recover(args.trace, places, args.out))
        for path in may_be_beside(args.trace) if args.out is None else []:
            try:
                _say(path, recover(path, places))
            except KvhookError as error:
                print(f"{short(path)}: {error}")
        return 0


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
