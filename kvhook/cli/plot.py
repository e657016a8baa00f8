"""``kvhook plot``."""

from __future__ import annotations

import argparse
from pathlib import Path

from kvhook.errors import KvhookError


class PlotCommand:
    """Draw a run for a paper or a slide: KV usage, the queue, the hit rate and the tokens of each step.

    The suffix of FILE says how: .png, .svg or .pdf. Needs matplotlib (pip install "kvhook[plot]").

    Example:
      $ kvhook plot run.kvh -o usage.svg
      usage.svg  0.1 MB
    """

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument("traces", metavar="TRACE", nargs="+", help="a .kvh trace or a ring")
        parser.add_argument("-o", "--out", metavar="FILE", type=Path, default=Path("usage.png"), help="the picture")
        parser.add_argument("--force", action="store_true", help="replace FILE if it exists")

    def run(self, args: argparse.Namespace) -> int:
        """Draw it, and say how large it is."""
        from kvhook.report.picture import draw
        from kvhook.report.runs import read
        from kvhook.report.write import check, names_of
        from kvhook.trace import open_trace

        check(args.out, args.force)
        traces = [open_trace(path) for path in args.traces]
        runs = [read(t, t.cores(), name) for t, name in zip(traces, names_of(args.traces), strict=True)]
        try:
            draw(runs, args.out)
        except OSError as error:
            raise KvhookError(f"cannot write {args.out}: {error.strerror or error}") from None
        print(f"{args.out}  {args.out.stat().st_size / 1e6:.1f} MB")
        return 0
