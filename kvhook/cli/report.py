"""``kvhook report``."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from kvhook.errors import KvhookError


class ReportCommand:
    """Make a page of charts that a browser opens: one HTML file that loads nothing.

    Several TRACEs are laid over each other. What was recorded inside the engine cores is taken from the files beside
    each trace. A run of a million steps takes some seconds, and the page stays small: long runs are reduced to some
    thousands of buckets that keep every peak.

    Example:
      $ kvhook report run.kvh -o report.html
      report.html  0.2 MB
    """

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument("traces", metavar="TRACE", nargs="+", help="a .kvh trace or a ring")
        parser.add_argument("-o", "--out", metavar="FILE", type=Path, default=Path("report.html"), help="the page")
        parser.add_argument("--force", action="store_true", help="replace FILE if it exists")

    def run(self, args: argparse.Namespace) -> int:
        """Write it, and say how large it is."""
        from kvhook import __version__
        from kvhook.report.runs import read
        from kvhook.report.write import check, names_of, write_report
        from kvhook.trace import open_trace

        check(args.out, args.force)
        traces = [open_trace(path) for path in args.traces]
        runs = [read(t, t.cores(), name) for t, name in zip(traces, names_of(args.traces), strict=True)]
        # the summary leaves warm-up out, the charts show it
        runs = [
            dataclasses.replace(run, summary=trace.summary()) if any(s.warmup for s in run.scopes) else run
            for run, trace in zip(runs, traces, strict=True)
        ]
        try:
            write_report(args.out, runs, __version__, overwrite=args.force)
        except OSError as error:
            raise KvhookError(f"cannot write {args.out}: {error.strerror or error}") from None
        print(f"{args.out}  {args.out.stat().st_size / 1e6:.1f} MB")
        return 0
