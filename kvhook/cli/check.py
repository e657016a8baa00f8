"""``kvhook check``."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvhook.check import Result


class Verb:
    """Check the collector on this machine: one line per check, and a verdict.

    Without --engine no vLLM is needed: import, methods, error handling, fallback, key metrics, monitoring. With it a
    real engine is started, and its numbers are compared with what came back, with block arithmetic, and with each
    other. The exit code is 0 if every check passed. (kvhook doctor tells what would be recorded here, and why not.)
    """

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument("--engine", action="store_true", help="start a vLLM engine, on a tiny random model")
        parser.add_argument("--model", metavar="NAME", help="the same on this model, with vLLM's defaults")
        parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")

    def run(self, args: argparse.Namespace) -> int:
        """Check, and say it."""
        from kvhook.check import run
        from kvhook.check.structure import CHECKS

        results = _show(run(CHECKS), args.json)
        if args.engine or args.model is not None:
            results += _inference(args.model, args.json)
        counts = {outcome: sum(r.outcome == outcome for r in results) for outcome in ("ok", "FAILED", "skipped")}
        if args.json:
            print(json.dumps({"checks": [r._asdict() for r in results], **counts}, indent=2))
        else:
            more = f", {counts['skipped']} skipped" if counts["skipped"] else ""
            print(f"{counts['ok']} of {len(results)} checks passed{more}" + (": FAILED" if counts["FAILED"] else ""))
        return 1 if counts["FAILED"] else 0


def _show(results: Iterable[Result], quiet: bool) -> list[Result]:
    kept = []
    for r in results:
        kept.append(r)
        if not quiet:
            print(f"{r.outcome:8}{r.title:40} {r.found}", flush=True)
    return kept


def _inference(model: str | None, quiet: bool) -> list[Result]:
    import kvhook
    from kvhook.check import run
    from kvhook.check.inference import Inference, make_llm
    from kvhook.demo import engine

    engine.require_vllm()
    for name, value in engine.ENVIRONMENT.items():
        if model is None or name == "VLLM_LOGGING_LEVEL":
            os.environ.setdefault(name, value)
    log = Path(tempfile.gettempdir()) / f"kvhook-check-{os.getpid()}.log"
    kvhook.install()
    try:
        with engine.messages_to(log):
            llm = make_llm(model)
        log.unlink()
        return _show(run(Inference(llm).checks()), quiet)
    finally:
        kvhook.uninstall()
