"""The command line: one module per verb, one list of verbs.

A verb is served by a small class: its docstring is its help, `prepare_parser` declares its arguments, `run` does the
work and gives the exit code. A user's mistake is a `KvhookError`: one line on stderr, exit code 1.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Sequence
from typing import Protocol, cast

from kvhook import __version__, streams
from kvhook.cli.people import for_people
from kvhook.errors import KvhookError, shown
from kvhook.facts import printable

#: Set, it lets an error of kvhook's own show where it happened.
ENV_DEBUG = "KVHOOK_DEBUG"
#: What such an error is called otherwise.
INTERNAL = "an error in kvhook"

#: Purpose -> verbs that serve it -> where their class is. The one list of verbs, in the order of the help.
VERBS: dict[str, dict[str, str]] = {
    "try it": {
        "demo": "kvhook.cli.demo:DemoCommand",
        "doctor": "kvhook.cli.doctor:DoctorCommand",
        "check": "kvhook.cli.check:CheckCommand",
    },
    "record a program without a change to it": {
        "run": "kvhook.cli.run:RunCommand",
    },
    "read a recorded run": {
        "summary": "kvhook.cli.summary:SummaryCommand",
        "compare": "kvhook.cli.compare:CompareCommand",
        "cache": "kvhook.cli.cache:CacheCommand",
        "whatif": "kvhook.cli.whatif:WhatIfCommand",
        "report": "kvhook.cli.report:ReportCommand",
        "plot": "kvhook.cli.plot:PlotCommand",
        "export": "kvhook.cli.export:ExportCommand",
    },
    "look at the processes of this machine, running or ended": {
        "ls": "kvhook.cli.ls:LsCommand",
        "top": "kvhook.cli.top:TopCommand",
        "tail": "kvhook.cli.tail:TailCommand",
        "autopsy": "kvhook.cli.autopsy:AutopsyCommand",
        "recover": "kvhook.cli.recover:RecoverCommand",
        "clean": "kvhook.cli.clean:CleanCommand",
    },
}

#: Verbs whose output may have no end. They end with 0 when the reader of a pipe has gone; the others go on to their
#: exit code.
ENDLESS = ("tail",)

_DESCRIPTION = """\
kvhook records what vLLM's KV cache does in every engine step: how full it is, how many prompt tokens the prefix cache
gives, what waits and what is preempted, and how long it all takes. A program is recorded with one line before it
makes its engine; the commands below read what was recorded.

  import kvhook
  session = kvhook.install(trace="run.kvh")
  llm = LLM(...)

  $ kvhook summary run.kvh
  vLLM 0.32.0, tiny-llama: 56 steps in 1.53 s
    KV cache        peak 90.9 %, p95 90.9 %, mean 62.0 % of 11 blocks of 32 tokens
    prefix cache    hit rate 39.8 % of this run: 320 of 804 tokens
    ..."""


class Command(Protocol):
    """What serves a verb: its docstring is the verb's help."""

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""

    def run(self, args: argparse.Namespace) -> int:
        """Do it; gives the exit code."""


def load(verb: str) -> Command:
    """The command of a verb."""
    module, _, name = next(verbs[verb] for verbs in VERBS.values() if verb in verbs).partition(":")
    return cast(Command, getattr(importlib.import_module(module), name)())


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line. Every verb's module is imported for its help; none imports vLLM, and
    numpy is imported by those that run."""
    parser = argparse.ArgumentParser(
        prog="kvhook",
        usage="%(prog)s [-h] [--version] COMMAND ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"kvhook {__version__}")
    commands = parser.add_subparsers(
        dest="verb", metavar="COMMAND", required=True, prog="kvhook", help=argparse.SUPPRESS
    )
    lines = []
    for purpose, verbs in VERBS.items():
        lines += ["", f"to {purpose}:"]
        for verb in verbs:
            command = load(verb)
            text = inspect.cleandoc(command.__doc__ or "")
            lines.append(f"  {verb:10}{text.splitlines()[0]}")
            command.prepare_parser(
                commands.add_parser(verb, description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
            )
    parser.description = "\n".join([_DESCRIPTION, *lines])
    parser.epilog = "kvhook COMMAND --help tells more about a command, with an example."
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code: 2 for wrong usage, 1 for a mistake or a finding, 3 for a condition of
    ``--fail-if`` that holds, 130 for Ctrl-C."""
    streams.open_closed()
    try:
        parser = make_parser()
        _check_verb(parser, sys.argv[1:] if argv is None else argv)
        return _run(parser.parse_args(argv))
    except SystemExit as end:  # the help was asked for, or the usage is wrong
        if (why := streams.settle()) and not end.code:
            raise SystemExit(_unwritten("kvhook", why)) from None
        raise
    finally:
        streams.settle()


def _run(args: argparse.Namespace) -> int:
    with contextlib.suppress(AttributeError, OSError, ValueError):
        # a name in a file, or of one, may hold what this terminal's encoding has not
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    called = f"kvhook {args.verb}"
    try:
        with for_people(to_the_end=args.verb not in ENDLESS):
            code = load(args.verb).run(args)
        why = streams.settle()
        return code if why is None else code or _unwritten(called, why)
    except KvhookError as error:
        return _failed(called, str(error))
    except KeyboardInterrupt:
        streams.say("")
        return 130
    except BrokenPipeError:
        return 0  # the program that reads our output (head, less) has ended
    except OSError as error:
        named = f"{error.filename}: " if error.filename else ""
        return _failed(called, f"{named}{error.strerror or error}")
    except MemoryError:
        return _failed(called, "there is not enough memory for this")
    except Exception as error:
        if os.environ.get(ENV_DEBUG):
            raise
        return _failed(called, internal(error))


def internal(error: Exception) -> str:
    """What is said of an error that is kvhook's own."""
    why = printable(f"{type(error).__name__}: {error}")[:300]
    return f"{INTERNAL}: {why} ({ENV_DEBUG}=1 shows where; please report it)"


def _check_verb(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """End with the command that was probably meant, where there is none of this name."""
    there = [verb for verbs in VERBS.values() for verb in verbs]
    if words and not words[0].startswith("-") and words[0] not in there:
        near = difflib.get_close_matches(words[0], there, 1)
        meant = f"did you mean kvhook {near[0]}?" if near else f"there are {', '.join(there)}"
        parser.error(f"there is no command {words[0]!r}; {meant}")


def _failed(called: str, why: str) -> int:
    streams.say(f"{called}: {shown(why)}")
    return 1


def _unwritten(called: str, why: OSError) -> int:
    return _failed(called, f"standard output cannot be written: {why.strerror or why}")


if __name__ == "__main__":
    sys.exit(main())
