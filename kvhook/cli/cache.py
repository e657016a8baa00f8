"""``kvhook cache``."""

from __future__ import annotations

import argparse
import dataclasses
import glob
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvhook.records.core import CoreRecords
    from kvhook.trace import Trace


class CacheCommand:
    """Say where prefix-cache hits come from, and what misses, evictions and preemptions cost.

    TRACE is the .kvh trace of a run, or a folder or a pattern ("run*.kvh") of several. What is shown was recorded
    inside the engine cores, in files beside it (TRACE.core*.kvh). With kvhook.install(core="blocks") also what happened
    to single blocks: how long they lived, and which prefixes requests share.

    Example:
      $ kvhook cache run.kvh
      run.kvh: 331 steps of the engine core, 40 requests ended
        scheduled       10,407 tokens: 7,230 prefill, 2,360 decode, 817 computed again
                        7.9 % of the work was done twice, for requests that had been preempted
        limited by      no KV blocks 75.2 %, nobody waited 18.1 %, token budget 6.6 %
        ...
    """

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument("trace", metavar="TRACE", help="a .kvh trace, a folder or a pattern of them")
        parser.add_argument("--json", action="store_true", help="print one JSON object instead of a page")

    def run(self, args: argparse.Namespace) -> int:
        """Print it."""
        from kvhook.analysis.core_report import report
        from kvhook.cli.common import open_run
        from kvhook.errors import KvhookError
        from kvhook.records.core_files import core_files, is_of_core, open_cores
        from kvhook.ring.trace_file import TRACE_SUFFIX, header_of
        from kvhook.text.core_report import as_text

        path = Path(args.trace)
        if is_of_core(path):
            header_of(path)  # says what is wrong with it, if something is
            cores = open_cores([path], args.trace)
        elif path.suffix == TRACE_SUFFIX and not path.exists() and not glob.has_magic(args.trace):
            cores = open_cores(core_files(path), args.trace)  # the front end may have left no trace
        else:
            cores = _counted(open_run(args.trace))
        if not len(cores):
            raise KvhookError(f"there are no files of engine cores beside {args.trace}: {cores.why_none}")
        found = report(cores)
        if args.json:
            print(json.dumps(_plain(dataclasses.asdict(found)), indent=2))
        else:
            print(as_text(found, args.trace))
        return 0


def _counted(trace: Trace) -> CoreRecords:
    """The engine cores of a run; of ranks that do the same work one."""
    from kvhook.records.replicas import counted

    return trace.cores().of_engines(counted(trace.engines.facts()))


def _plain(value: Any) -> Any:
    """JSON has no NaN: what is not known is null."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value
