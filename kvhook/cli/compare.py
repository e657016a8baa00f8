"""``kvhook compare``."""

from __future__ import annotations

import argparse
import json
import string
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from kvhook.cli.common import open_run
from kvhook.cli.conditions import CONDITION_HOLDS, add_fail_if, failed
from kvhook.errors import KvhookError

if TYPE_CHECKING:
    from kvhook.analysis.compare import Side


class CompareCommand:
    """Compare runs: the same numbers of each, and which differences are more than chance.

    Each SIDE is a run, or several repeats of it with commas between: A1,A2. The first is what the others are compared
    with. They are called A, B, C... in conditions. A verdict says whether a difference stands out of what a run varies
    from step to step. With repeats it also accounts for how much runs differ from each other.

    What a program marked as warm-up is left out unless --warmup is given; --scope and --label choose parts of runs.
    The exit code is 3 if a condition of --fail-if is true, 1 if one of its numbers is not known.

    Example:
      $ kvhook compare base.kvh new.kvh
      A  base.kvh
      B  new.kvh

                                             A             B         B - A   B / A
      ...
      prefix cache hit rate             77.8 %        88.9 %      +11.1 pp    1.14  B is better (+8.0 pp to +14.2 pp)
      ...
      $ kvhook compare base.kvh new.kvh --fail-if "B.itl_p99 > 1.1 * A.itl_p99"
    """

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument(
            "sides", metavar="SIDE", nargs="+", help="a .kvh trace, an export, or a PID; repeats with commas"
        )
        parser.add_argument(
            "--scope", metavar="NAME", help="only this scope of each run: its name or path, or a kind of call"
        )
        parser.add_argument("--label", metavar="TEXT", help="only the requests with this label")
        parser.add_argument("--warmup", action="store_true", help="count what is marked as warm-up as well")
        add_fail_if(parser, "B.itl_p99 > 1.1 * A.itl_p99")
        parser.add_argument(
            "--confidence",
            type=_share,
            default=0.95,
            metavar="SHARE",
            help="that all intervals hold together (default: 0.95)",
        )
        form = parser.add_mutually_exclusive_group()
        form.add_argument("--json", action="store_true", help="print one JSON object")
        form.add_argument("--markdown", action="store_true", help="print a table for a pull request")

    def run(self, args: argparse.Namespace) -> int:
        """Print it."""
        from kvhook.analysis.compare import compare
        from kvhook.text.compare import as_markdown, as_text

        if not 2 <= len(args.sides) <= len(string.ascii_uppercase):
            raise KvhookError("two runs at least are compared: kvhook compare A.kvh B.kvh")
        part = {"scope": args.scope, "label": args.label, "warmup": args.warmup}
        sides = [_side(letter, text, part) for letter, text in zip(string.ascii_uppercase, args.sides, strict=False)]
        found = compare(sides, args.confidence)
        if args.json:
            print(json.dumps(found.as_dict(), indent=2))
        else:
            print(as_markdown(found) if args.markdown else as_text(found))
        held = failed(args.fail_if, {side.letter: [run.summary for run in side.runs] for side in sides})
        return CONDITION_HOLDS if held else 0


def _side(letter: str, text: str, part: dict[str, Any]) -> Side:
    from kvhook.analysis.compare import Side
    from kvhook.analysis.series import measure
    from kvhook.analysis.settings import settings_of

    # a name may have a comma in it
    paths = [text] if Path(text).exists() else [part for part in text.split(",") if part]
    if not paths:
        raise KvhookError(f"{text!r} names no file")
    runs, facts = [], []
    for path in paths:
        trace = open_run(path).select(**part)
        cores = trace.cores()
        runs.append(measure(trace, cores))
        facts += [*trace.meta["engines"], *cores.facts]
    return Side(letter, ", ".join(PurePath(path).name for path in paths), runs, settings_of(facts))


def _share(text: str) -> float:
    """A probability."""
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0.5 <= share < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share from 0.5 to below 1, such as 0.95")
    return share
