"""``kvhook plot``."""

from __future__ import annotations

import argparse

from kvhook.cli.pages import add_pages, failed_to_write, read_runs, say


class PlotCommand:
    """Draw a run for a paper or a slide: KV usage, the queue, the hit rate and the tokens of each step.

    The suffix of FILE says how: .png, .svg or .pdf. Needs matplotlib (pip install "kvhook[plot]").

    Example:
      $ kvhook plot run.kvh -o usage.svg
      usage.svg  84.0 kB
    """

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        add_pages(parser, "usage.png", "the picture")

    def run(self, args: argparse.Namespace) -> int:
        """Draw it, and say how large it is."""
        from kvhook.report.picture import draw

        runs = read_runs(args)
        try:
            draw(runs, args.out)
        except OSError as error:
            raise failed_to_write(args.out, error) from None
        say([args.out])
        return 0
