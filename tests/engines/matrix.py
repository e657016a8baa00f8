"""Runs the truth tests on one real vLLM after the other: what `make matrix` does. README.md tells more.

    python tests/engines/matrix.py                     everything
    python tests/engines/matrix.py 0.9.2 0.16.0        these releases only
    python tests/engines/matrix.py --list              what there is, and what is built
    python tests/engines/matrix.py --build 0.9.2       only make the environment
    python tests/engines/matrix.py --table README.md   after the run, write the table into that file

Each release has an environment of its own, made with plain pip from `lock/VERSION.txt` and kept in a cache, so that
only the first run takes long. kvhook itself is not installed into it: it comes from this checkout.

This file is the command line; the modules beside it whose names begin with `matrix_` do the work.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

# The neighbours of a script are found by their bare names.
from json_files import write_json
from matrix_environments import MatrixError, build, total_size
from matrix_places import alone, cache, place
from matrix_releases import RELEASES, Entry, Release, entries_of
from matrix_run import Outcome, joined, run_entry, tiny_model, today
from matrix_table import known, plain_table, show_list, write_table
from setup_words import say


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("versions", nargs="*", metavar="VERSION", help="releases to run; all if none is named")
    parser.add_argument("--list", action="store_true", help="show the entries and what is built, and end")
    parser.add_argument("--build", action="store_true", help="make the environments and end")
    parser.add_argument("--only-table", action="store_true", help="run nothing, show the last results")
    parser.add_argument("--entry", metavar="TEXT", default="", help="only entries with this in their name, as V1-own")
    parser.add_argument("--table", metavar="FILE", type=Path, help="write the table of all last results into FILE")
    parser.add_argument("--under", metavar="COMMAND", default="", help="run the engines under it, as 'nice -n 19'")
    parser.add_argument("--pytest", metavar="ARGUMENTS", default="", help="handed on to pytest")
    options = parser.parse_args(arguments)
    for version in options.versions:
        if version not in RELEASES:
            parser.error(f"there is no {version} in the matrix; it has {', '.join(RELEASES)}")
    return options


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    releases = [RELEASES[v] for v in options.versions] or list(RELEASES.values())
    try:
        if options.list:
            show_list(releases)
            return 0
        if options.build:
            for release in releases:
                build(release)
            say(total_size())
            return 0
        outcomes = [] if options.only_table else run(releases, options)
    except MatrixError as error:
        sys.stderr.write(f"\n{error}\n")
        return 1
    all_entries = [entry for release in RELEASES.values() for entry in entries_of(release)]
    if options.table:
        write_table(options.table, known(all_entries))
    say("\n" + plain_table(known(all_entries) if options.only_table else outcomes))
    return int(any(outcome.failed for outcome in outcomes))


def run(releases: list[Release], options: argparse.Namespace) -> list[Outcome]:
    """Build what is lacking, and run every entry."""
    model = tiny_model()
    outcomes = [outcome for release in releases for outcome in run_release(release, model, options)]
    say(f"\nTraces of the same workload: {cache() / 'traces'}\nDisk use: {total_size()}")
    return outcomes


def run_release(release: Release, model: Path, options: argparse.Namespace) -> list[Outcome]:
    """Build a release if it is lacking, and run its entries; where that fails, each of them has failed."""
    entries = [entry for entry in entries_of(release) if options.entry in entry.name]
    try:
        build(release)
    except MatrixError as error:
        say(str(error))
        first = str(error).splitlines()[0]
        return [Outcome(entry.name, today(), failed=1, note=first) for entry in entries]
    outcomes = []
    for entry in entries:
        say(f"vLLM {release.version}, {entry.engine}, {entry.process}: {entry.reason or 'running'}")
        with alone(place("logs", f"{entry.name}.lock")):
            outcome = run_entry(entry, model, shlex.split(options.under), shlex.split(options.pytest))
            write_json(place("results", f"{entry.name}.json"), outcome._asdict())
        outcomes.append(outcome)
        tell(entry, outcome)
    return outcomes


def tell(entry: Entry, outcome: Outcome) -> None:
    """What came out of an entry, and where its log is if something failed."""
    if not entry.reason:
        counts = f"{outcome.passed} passed, {outcome.failed} failed, {outcome.skipped} skipped"
        say(f"  {joined(f'{outcome.verdict}: {counts}, {outcome.seconds:.0f} s', outcome.note)}")
    if outcome.failed:
        say(f"  the log: {place('logs', entry.name + '.txt')}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
