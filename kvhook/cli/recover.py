"""``kvhook recover``."""

from __future__ import annotations

import argparse
from pathlib import Path

from kvhook.cli.common import add_dir
from kvhook.discovery.rings import directories


class RecoverCommand:
    """Complete the trace of a process that was killed with what only its ring still holds.

    A trace is written once a second or more often. What was recorded after the last time is in the ring alone. The
    file is replaced when the new one is whole, or left alone with --out.

    Example:
      $ kvhook recover run.kvh
      run.kvh: engine 0: 37 records added
    """

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument("trace", metavar="FILE.kvh", type=Path, help="the trace")
        parser.add_argument("--out", type=Path, metavar="OUT.kvh", help="write here instead")
        add_dir(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Do it, and say what was added."""
        from kvhook.discovery.recovery import recover

        done = recover(args.trace, directories(args.dir), args.out)
        if done.reason:
            print(f"{args.trace}: {done.reason}")
        for engine, added in sorted(done.added.items()):
            lost = done.missing.get(engine, 0)
            gap = f"; {lost:,} before them had been overwritten, and are lost" if lost else ""
            print(f"{done.path}: engine {engine}: {added:,} records added{gap}")
        return 0
