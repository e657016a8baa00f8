"""``kvhook doctor``."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvhook.doctor import Diagnosis, EngineFound


class DoctorCommand:
    """Tell whether kvhook would record here, and which columns it would fill.

    Looks at the vLLM of this Python, every place that kvhook patches in it, every column, wrapt, the directory of the
    rings and the environment. No engine is started. The exit code is 0 if a run would be recorded, 1 if not.

    With RUN: what went wrong inside kvhook while that run was recorded, and how many records are lost. The exit code is
    1 if there is anything.

    Example:
      $ kvhook doctor
      kvhook 0.1.0, Python 3.11.7, Linux x86_64
      vLLM 0.32.0 (this kvhook knows releases up to 0.33.0)
      ...
      A run here is recorded.
    """

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument("runs", nargs="*", metavar="RUN", help="a recorded run: tell what went wrong while it was")
        parser.add_argument("--json", action="store_true", help="print one JSON object")
        parser.add_argument(
            "--level", choices=("full", "light"), default="full", help="what kvhook.install(level=...) would record"
        )
        parser.add_argument("--source", action="store_true", help="print the code that would run in every step")

    def run(self, args: argparse.Namespace) -> int:
        """Look, and say it."""
        from kvhook.doctor import examine, examine_run

        if args.runs:
            found_in = {path: examine_run(path) for path in args.runs}
            if args.json:
                print(json.dumps(found_in, indent=2))
            else:
                for path, lines in found_in.items():
                    print("\n  ".join([f"{path}:", *(lines or ["nothing went wrong, and no record is lost"])]))
            return 1 if any(found_in.values()) else 0
        found = examine(args.level)
        if args.json:
            print(json.dumps(found.as_dict(), indent=2))
        elif args.source:
            print("\n".join(f"# {e.engine} ({e.adapter})\n{e.source}" for e in found.engines))
        else:
            print("\n".join(_lines(found)))
        return 1 if found.problems else 0


def _lines(d: Diagnosis) -> Iterator[str]:
    yield f"kvhook {d.kvhook}, Python {d.python}, {d.machine}"
    yield f"vLLM {d.vllm or 'not found'} (this kvhook knows releases up to {d.newest_known})"
    yield f"wrapt {d.wrapt}, {'with' if d.wrapt_c_extension else 'WITHOUT'} its C extension"
    yield f"step path in {'C' if d.step_path == 'c' else 'Python'}"
    if d.ring_directory:
        yield f"rings go to {d.ring_directory} ({d.ring_directory_free_bytes / 2**20:,.0f} MiB free)"
    for name, value in d.environment.items():
        yield f"environment: {name}={value}"
    for engine in d.engines:
        yield ""
        yield from _engine_lines(engine)
    if d.vllm:
        yield ""
        recorded = "NOT recorded" if d.core_problems else "recorded"
        yield f"the engine core is {recorded} too (core='steps', the default of kvhook.install)"
        for problem in d.core_problems:
            yield f"  {problem}"
        if not d.core_problems and d.own_process_problem:
            yield textwrap.fill(
                f"except one in a process that is spawned for it: {d.own_process_problem}",
                110,
                initial_indent="  ",
                subsequent_indent="  ",
            )
    yield ""
    for note in d.notes:
        yield f"note: {note}"
    for problem in d.problems:
        yield f"PROBLEM: {problem}"
    yield "A run here is NOT recorded." if d.problems else "A run here is recorded."


def _engine_lines(e: EngineFound) -> Iterator[str]:
    yield f"{e.engine}, served by the adapter {e.adapter}"
    for target in e.targets:
        mark = "found  " if target.found else "MISSING" if target.required else "not had"
        says = f"  ({target.says})" if target.says else ""
        yield f"  {mark}  {target.role or 'needed':12} {target.path}{says}"
    for kind in e.live:
        yield f"  {len(e.live[kind])} columns of a {kind} are live{':' if e.live[kind] else ''}"
        if e.live[kind]:
            yield textwrap.fill(", ".join(e.live[kind]), 110, initial_indent="    ", subsequent_indent="    ")
        yield f"  absent:{'' if e.absent[kind] else ' none'}"
        for why in dict.fromkeys(e.absent[kind].values()):
            names = [name for name, reason in e.absent[kind].items() if reason == why]
            if len(names) == 1:
                yield f"    {names[0]:34} {why}"
            else:
                yield textwrap.fill(", ".join(names), 110, initial_indent="    ", subsequent_indent="    ")
                yield f"    {'':34} {why}"
