"""``kvhook summary``."""

from __future__ import annotations

import argparse
import json


class Verb:
    """Print the summary of a recorded run, or of several side by side.

    FILE is a .kvh trace, or the ring of a process (kvhook ls names them). With more than one FILE a column each, also
    of different vLLM versions.
    """

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument("files", metavar="FILE", nargs="+", help="a .kvh trace or a ring")
        parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")

    def run(self, args: argparse.Namespace) -> int:
        """Print it."""
        from kvhook.text.compare import side_by_side
        from kvhook.trace import open_trace

        summaries = [open_trace(file).summary() for file in args.files]
        if args.json:
            plain = [s.as_dict() for s in summaries]
            print(json.dumps(plain[0] if len(plain) == 1 else dict(zip(args.files, plain, strict=True)), indent=2))
        elif len(summaries) == 1:
            print(summaries[0])
        else:
            print(side_by_side(summaries, args.files))
        return 0
