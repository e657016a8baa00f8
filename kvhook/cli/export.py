"""``kvhook export``."""

from __future__ import annotations

import argparse
from pathlib import Path

from kvhook.cli.common import open_run
from kvhook.cli.pages import say
from kvhook.errors import KvhookError


class ExportCommand:
    """Write a recorded run in another format.

    The suffix of OUT says which: .parquet and .arrow (a file for each table; needs pyarrow), .csv (the same; finished
    requests go to OUT.requests.csv, facts about the run to OUT.meta.json), .jsonl (facts, then a line for each row),
    .kvh, or .perfetto.json.gz, which https://ui.perfetto.dev opens.

    If OUT ends in / it is a folder of Parquet files for many runs: OUT/run=NAME/engine=N/steps.parquet. DuckDB,
    Polars, Spark and Ray read all of its runs with one pattern, OUT/*/*/steps.parquet.

    With --format mooncake OUT holds a line for each request: when it came, how long it was, and a number for each block
    of its prompt, equal where prompts begin equally. AIPerf, Dynamo's mocker and GuideLLM replay such files. The run
    must have been recorded with core="blocks".

    Example:
      $ kvhook export run.kvh run.csv
      run.csv  96.4 kB
      run.requests.csv  12.9 kB
      ...
    """

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument("file", metavar="FILE", help="a .kvh trace, an export, or a PID")
        parser.add_argument("out", metavar="OUT", help="the file to write, or a folder of many runs")
        parser.add_argument("--run", metavar="NAME", help="the run's name in a folder of many (default: FILE's name)")
        parser.add_argument("--format", choices=["mooncake"], help="what OUT holds, where its suffix does not say it")
        parser.add_argument(
            "--compress",
            action="store_true",
            help="a .kvh file in a tenth of the space, which opens like any other",
        )
        parser.add_argument("--force", action="store_true", help="replace OUT if it exists")

    def run(self, args: argparse.Namespace) -> int:
        """Write it, and say what was written."""
        trace = open_run(args.file)
        try:
            if args.format == "mooncake":
                from kvhook.export.mooncake import write

                written = write(trace.block_requests(), Path(args.out), overwrite=args.force)
            else:
                written = trace.dump(args.out, overwrite=args.force, compress=args.compress, run=args.run)
        except OSError as error:
            raise KvhookError(f"cannot write {args.out}: {error.strerror or error}") from None
        say(written)
        return 0
