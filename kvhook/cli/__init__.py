"""The command line: one module per verb, one list of verbs.

A verb is a small class: its docstring is its help, `prepare_parser` declares its arguments, `run` does the work and
gives the exit code. A user's mistake is a `KvhookError`: one line on stderr, exit code 1.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import sys
from collections.abc import Sequence
from typing import Protocol, cast

from kvhook.errors import KvhookError

#: Verb -> module with a class `Verb`, loaded only when the verb is used. In the order of the help.
VERBS: dict[str, str] = {
    "demo": "kvhook.cli.demo",
    "doctor": "kvhook.cli.doctor",
    "check": "kvhook.cli.check",
    "summary": "kvhook.cli.summary",
    "export": "kvhook.cli.export",
    "ls": "kvhook.cli.ls",
    "tail": "kvhook.cli.tail",
    "autopsy": "kvhook.cli.autopsy",
    "recover": "kvhook.cli.recover",
    "clean": "kvhook.cli.clean",
}


class Command(Protocol):
    """What a verb's module offers as `Verb`."""

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""

    def run(self, args: argparse.Namespace) -> int:
        """Do it; gives the exit code."""


def load(verb: str) -> Command:
    """The command behind a verb of `VERBS`."""
    return cast(Command, importlib.import_module(VERBS[verb]).Verb())


def make_parser(only: str | None = None) -> argparse.ArgumentParser:
    """The parser of the whole command line.

    Args:
        only: prepare the arguments of this verb alone; the others then know just their help line.
    """
    import kvhook

    parser = argparse.ArgumentParser(prog="kvhook", description="See, step by step, what vLLM's KV cache does.")
    parser.add_argument("--version", action="version", version=f"kvhook {kvhook.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="COMMAND", required=True)
    for verb in VERBS:
        command = load(verb)
        text = inspect.cleandoc(command.__doc__ or "")
        one = verbs.add_parser(
            verb,
            help=text.split("\n", 1)[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if only in (None, verb):
            command.prepare_parser(one)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code (2 for wrong usage, 1 for a mistake, 130 for Ctrl-C)."""
    args = make_parser().parse_args(argv)
    try:
        code = load(args.verb).run(args)
        sys.stdout.flush()
        return code
    except KvhookError as error:
        print(f"kvhook {args.verb}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader (head, less) went away: that is its right. Keep Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
