"""``kvhook summary``."""

from __future__ import annotations

import argparse
import json

from kvhook.cli.common import open_run, positive
from kvhook.cli.conditions import CONDITION_HOLDS, add_fail_if, failed


class SummaryCommand:
    """Print the summary of a recorded run, or of several side by side.

    FILE is a .kvh trace, what was exported from one, or the number of a process: then its ring is read, which holds
    the last steps (kvhook ls). With more than one FILE there is a column for each; they may be of different vLLM
    versions. Which differences are more than chance says kvhook compare.

    What a program marked as warm-up is left out unless --warmup is given; --scope and --label choose a part of a run.
    The exit code is 3 if a condition of --fail-if is true for one of the files, 1 if one of its numbers is not known.

    Example:
      $ kvhook summary run.kvh
      vLLM 0.32.0, tiny-llama: 56 steps in 1.53 s
        step time       p50 9.18 ms, p99 155 ms (99% of it inside steps)

        KV cache        peak 90.9 %, p95 90.9 %, mean 62.0 % of 11 blocks of 32 tokens
        prefix cache    hit rate 39.8 % of this run: 320 of 804 tokens
        prompt tokens   804: 484 computed, 320 cached; 529 per second in steps
        ...
      $ kvhook summary run.kvh --windows 12
    """

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument("files", metavar="FILE", nargs="+", help="a .kvh trace, an export, or a PID")
        add_fail_if(parser, "prefix_cache_hit_rate < 0.8")
        parser.add_argument(
            "--windows", type=positive, default=0, metavar="N", help="show also how it went, in N windows of equal time"
        )
        parser.add_argument(
            "--scope", metavar="NAME", help="only this scope: its name or path, or a kind of call such as generate"
        )
        parser.add_argument("--label", metavar="TEXT", help="only the requests with this label")
        parser.add_argument("--warmup", action="store_true", help="count what is marked as warm-up as well")
        parser.add_argument("--scopes", action="store_true", help="list the scopes of the run instead")
        parser.add_argument(
            "--events", action="store_true", help="list what was done to the engines instead: sleep, new weights, ..."
        )
        parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")

    def run(self, args: argparse.Namespace) -> int:
        """Print it."""
        from kvhook.text.compare import table_of

        traces = [open_run(file) for file in args.files]
        if args.scopes:
            print("\n".join(str(scope) for trace in traces for scope in trace.scopes) or "this run has no scopes")
            return 0
        if args.events:
            events = [event for trace in traces for event in trace.engine_events]
            print("\n".join(map(str, events)) or "nothing was done to the engines of this run between their steps")
            return 0
        part = {"scope": args.scope, "label": args.label, "warmup": args.warmup}
        summaries = [trace.summary(**part) for trace in traces]
        windows = [trace.select(**part).windows(args.windows) for trace in traces] if args.windows else []
        if args.json:
            plain = [s.as_dict() for s in summaries]
            for one, cut in zip(plain, windows, strict=False):
                one["windows"] = cut.as_dict()
            print(json.dumps(plain[0] if len(plain) == 1 else dict(zip(args.files, plain, strict=True)), indent=2))
        else:
            print(summaries[0] if len(summaries) == 1 else table_of(summaries, args.files))
            for file, cut in zip(args.files, windows, strict=False):
                print(f"\n{file}: {cut}" if len(summaries) > 1 else f"\n{cut}")
        sides = {file: [summary] for file, summary in zip(args.files, summaries, strict=True)}
        return CONDITION_HOLDS if failed(args.fail_if, sides) else 0
