"""What ``kvhook report`` and ``kvhook plot`` share: runs are read, and one file is made of them."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvhook.cli.common import file_name, open_run, size
from kvhook.errors import KvhookError
from kvhook.files import check_target

if TYPE_CHECKING:
    from kvhook.report.runs import Run


def add_pages(parser: argparse.ArgumentParser, default: str, what: str) -> None:
    """``TRACE...``, ``--out`` and ``--force``."""
    parser.add_argument("traces", metavar="TRACE", nargs="+", help="a .kvh trace, an export, or a PID")
    parser.add_argument("-o", "--out", metavar="FILE", type=file_name, default=Path(default), help=what)
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")


def read_runs(args: argparse.Namespace, *, other_caches: bool = False) -> list[Run]:
    """The runs, once it is known that the file may be written.

    Args:
        args: what `add_pages` declares.
        other_caches: whether it is wanted what other KV caches would have found.
    """
    from kvhook.report import other_caches as caches
    from kvhook.report.runs import read
    from kvhook.report.write import names_of

    check_out(args.out, overwrite=args.force)
    runs = []
    for path, name in zip(args.traces, names_of(args.traces), strict=True):
        trace = open_run(path)
        cores = trace.cores()
        run = read(trace, cores, name)
        # the summary leaves warm-up out, the charts show it
        if any(scope.warmup for scope in run.scopes):
            run = dataclasses.replace(run, summary=trace.summary())
        if other_caches:
            found = f"{run.why_no_ledger}, and kvhook whatif" if run.why_no_ledger else caches.other_caches(cores, name)
            run = dataclasses.replace(run, other_caches=found)
        runs.append(run)
    return runs


def check_out(path: Path, *, overwrite: bool) -> None:
    """Whether a file may be written, before there is any work for it.

    Raises:
        KvhookError: it may not.
    """
    try:
        check_target(path, overwrite=overwrite)
    except OSError as error:
        raise failed_to_write(path, error) from None


def failed_to_write(path: Path, error: OSError) -> KvhookError:
    """What is said if the file cannot be written."""
    return KvhookError(f"cannot write {path}: {error.strerror or error}")


def say(paths: Sequence[Path]) -> None:
    """Name files that were written, with their sizes."""
    for path in paths:
        print(f"{path}  {size(path.stat().st_size)}")
