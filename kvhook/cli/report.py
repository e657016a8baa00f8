"""``kvhook report``."""

from __future__ import annotations

import argparse

from kvhook.cli.pages import add_pages, failed_to_write, read_runs, say


class ReportCommand:
    """Make a page of charts that a browser opens: one HTML file that loads nothing.

    Several TRACEs are laid over each other. What was recorded inside the engine cores is taken from the files beside
    each trace. A run of a million steps takes some seconds, and the page stays small: long runs are reduced to some
    thousands of buckets that keep every peak.

    Example:
      $ kvhook report run.kvh -o report.html
      report.html  186.4 kB
    """

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        add_pages(parser, "report.html", "the page")

    def run(self, args: argparse.Namespace) -> int:
        """Write it, and say how large it is."""
        from kvhook import __version__
        from kvhook.report.write import write_report

        runs = read_runs(args, other_caches=True)
        try:
            write_report(args.out, runs, __version__, overwrite=args.force)
        except OSError as error:
            raise failed_to_write(args.out, error) from None
        say([args.out])
        return 0
