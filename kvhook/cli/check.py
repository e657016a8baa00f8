"""``kvhook check``."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvhook.check import Result


class CheckCommand:
    """Check the collector on this machine: one line per check, and a verdict.

    Without --engine no vLLM is needed: import, methods, error handling, fallback, key metrics, monitoring. With it a
    vLLM engine is started, and what the collector says is compared with what came back, with block arithmetic, and
    between its sources. The exit code is 0 if nothing failed, else 1. (kvhook doctor tells what would be recorded
    here, and why not the rest.)

    Example:
      $ kvhook check
      ok      History and saving                          three collections, as a list and as a file
      ...
      passed: 10 of 10 checks
    """

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument("--engine", action="store_true", help="start a vLLM engine as well, on a tiny random model")
        parser.add_argument("--model", metavar="NAME", help="start it on this model, with vLLM's defaults")
        parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")

    def run(self, args: argparse.Namespace) -> int:
        """Check, and say it."""
        from kvhook.check import FAILED, run, structure, verdict

        results = [_show(result, args.json) for result in run(structure.CHECKS)]
        more = ""
        if args.engine or args.model is not None:
            on_engine, log = _inference(args.model, args.json)
            results += on_engine
            more = f"\nvLLM's messages are in {log}" if log.exists() else ""
        if args.json:
            print(json.dumps({"checks": [r._asdict() for r in results], "verdict": verdict(results)}, indent=2))
        else:
            print(verdict(results) + more)
        return 1 if any(r.outcome == FAILED for r in results) else 0


def _show(result: Result, quiet: bool) -> Result:
    if not quiet:
        print(f"{result.outcome:8}{result.title:44}{result.found}", flush=True)
    return result


def _inference(model: str | None, quiet: bool) -> tuple[list[Result], Path]:
    """The checks on an engine, and where vLLM's messages are; they are kept only if a check failed."""
    from kvhook.check import FAILED
    from kvhook.check.inference import check_engine

    folder = Path(tempfile.mkdtemp(prefix="kvhook-check-"))
    log = folder / "vllm.log"
    keep = True
    try:
        results = [_show(result, quiet) for result in check_engine(model, log)]
        keep = any(r.outcome == FAILED for r in results) and log.exists() and log.stat().st_size > 0
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    return results, log
