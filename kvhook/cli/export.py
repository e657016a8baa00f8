"""``kvhook export``."""

from __future__ import annotations

import argparse
from pathlib import Path

from kvhook.errors import KvhookError


class ExportCommand:
    """Write a recorded run in another format.

    The suffix of OUT says which: .jsonl (metadata, requests and steps, a line each), .csv (steps; finished requests
    go to OUT.requests.csv beside it), .kvh.

    Example:
      $ kvhook export run.kvh run.csv
      run.csv  0.1 MB
      run.requests.csv  0.0 MB
    """

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument("file", metavar="FILE", help="a .kvh trace or a ring")
        parser.add_argument("out", metavar="OUT", type=Path, help="the file to write")
        parser.add_argument(
            "--compress",
            action="store_true",
            help="a .kvh file in a tenth of the space, which opens like any other",
        )
        parser.add_argument("--force", action="store_true", help="replace OUT if it exists")

    def run(self, args: argparse.Namespace) -> int:
        """Write it, and say what was written."""
        from kvhook.trace import open_trace

        trace = open_trace(args.file)
        try:
            written = trace.dump(args.out, overwrite=args.force, compress=args.compress)
        except OSError as error:
            raise KvhookError(f"cannot write {args.out}: {error.strerror or error}") from None
        for path in written:
            print(f"{path}  {path.stat().st_size / 1e6:.1f} MB")
        return 0
