"""``kvhook clean``."""

from __future__ import annotations

import argparse

from kvhook.cli.common import add_dir, age, size
from kvhook.discovery.cleaning import leftovers, remove
from kvhook.discovery.rings import OLD
from kvhook.ring.directory import directories


class CleanCommand:
    """Remove what ended processes have left behind: rings, and temporary histories.

    Only what was last used more than a day ago, unless --all is given. What a running process uses is never touched.

    Example:
      $ kvhook clean
      /dev/shm/kvhook-1000/4736-246529-0.ring  3.7 MB, 2 d old: removed
      3.7 MB freed
    """

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument("--all", action="store_true", help="whatever its age")
        parser.add_argument("--dry-run", action="store_true", help="only say what would be removed")
        add_dir(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Remove it, and say what was removed."""
        from kvhook.ring.place import history_root

        found = leftovers(directories(args.dir), history_root())
        old = [x for x in found if args.all or x.age > OLD]
        total, failed = 0, 0
        for one in old:
            done = args.dry_run or remove(one)
            failed += not done
            total += one.bytes if done else 0
            what = "would be removed" if args.dry_run else "removed" if done else "cannot be removed"
            print(f"{one.path}  {size(one.bytes)}, {age(one.age)} old: {what}")
        kept = len(found) - len(old)
        rest = f"; {kept} younger than a day kept (--all takes them too)" if kept else ""
        print(f"{size(total)} {'would be ' if args.dry_run else ''}freed{rest}")
        return 1 if failed else 0
