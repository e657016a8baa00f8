"""``kvhook summary``."""

from __future__ import annotations

import argparse
import json


class Verb:
    """Print the summary of a recorded run.

    FILE is a .kvh trace, or the ring of a process (kvhook ls names them).
    """

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument("file", metavar="FILE", help="a .kvh trace or a ring")
        parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")

    def run(self, args: argparse.Namespace) -> int:
        """Print it."""
        from kvhook.trace import open_trace

        summary = open_trace(args.file).summary()
        print(json.dumps(summary.as_dict(), indent=2) if args.json else summary)
        return 0
