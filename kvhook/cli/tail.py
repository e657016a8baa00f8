"""``kvhook tail``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kvhook import streams
from kvhook.cli.common import add_dir, positive
from kvhook.discovery.follow import DIED, INTERVAL, News, follow
from kvhook.discovery.rings import ALIVE, choose, find_rings, parse_pid, wait_for
from kvhook.errors import KvhookError
from kvhook.ring.directory import directories
from kvhook.text.bar import shows_blocks
from kvhook.text.steps import StepLines

if TYPE_CHECKING:
    from kvhook.ring.layout import Header

_MOST_SECONDS = 10.0


class TailCommand:
    """Print one line per engine step, as it happens.

    Follows the newest ring of a running process, or that of PID. It only reads, and costs the engine nothing. The hit
    rate counts from the oldest step that the ring still holds. It ends when the engine is deleted or its process ends.

    Example:
      $ kvhook tail
         step          time      took  running  waiting             KV usage  hit rate   prompt  gener.  preempt.
           53  07:40:05.812   67.7 ms        1        0  ###.......   27.3 %    39.8 %        0       1
           54  07:40:05.888   76.6 ms        1        0  ###.......   27.3 %    39.8 %        0       1
    """

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument("pid", metavar="PID", nargs="?", help="a process, or a ring file (kvhook ls names them)")
        parser.add_argument("--engine", type=positive, metavar="N", help="number of the engine in its process")
        parser.add_argument("-n", "--lines", type=positive, default=10, metavar="N", help="begin so many steps back")
        parser.add_argument("--json", action="store_true", help="print each step as one line of JSON")
        parser.add_argument("--wait", action="store_true", help="wait for a run that starts later")
        parser.add_argument(
            "--interval", type=_interval, default=INTERVAL, metavar="S", help="seconds between two looks (0.01 to 10)"
        )
        add_dir(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Follow it to its end."""
        # numpy and all that reads a ring is imported before a ring is waited for: later it would cost its first steps
        import kvhook.trace  # noqa: F401
        from kvhook.ring.reader import RingReader

        path = self._path(args)
        try:
            with RingReader(path) as reader:
                if not args.json:
                    streams.say(f"process {reader.header.pid}, engine {reader.header.meta.get('engine', 0)}: {path}")
                news = follow(reader, interval=args.interval)
                for line in lines(
                    news, reader.header, args.lines, as_json=args.json, say=_say, ascii_only=not shows_blocks()
                ):
                    _print(line)
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise
            raise KvhookError(f"cannot read {path}: {error.strerror or error}") from None
        return 0

    def _path(self, args: argparse.Namespace) -> Path:
        which = parse_pid(args.pid) if args.pid else None
        if isinstance(which, Path):
            return which
        rings = find_rings(directories(args.dir))
        alive = any(r.state == ALIVE and which in (None, r.pid) and args.engine in (None, r.engine) for r in rings)
        if args.wait and not alive:
            streams.say("waiting for a run to start ...")
            return wait_for(lambda: directories(args.dir), which, args.engine).path
        return choose(rings, which, args.engine).path


def lines(
    news: Iterable[News],
    header: Header,
    back: int = 10,
    *,
    as_json: bool = False,
    say: Callable[[str], None],
    ascii_only: bool = False,
) -> Iterator[str]:
    """The lines for what comes from a ring.

    Args:
        news: see `kvhook.discovery.follow.follow`.
        header: of the ring.
        back: of the steps that the ring holds at the beginning, print so many.
        as_json: JSON instead of columns.
        say: takes what is not a step: records that were missed, and the end.
        ascii_only: draw the bar with ``#``.
    """
    from kvhook.records.rows import rows
    from kvhook.ring.slots import slot_head
    from kvhook.schema import STEP
    from kvhook.trace import from_slots

    text = StepLines(header.monotonic_ns, header.realtime_ns, ascii_only=ascii_only)
    if not as_json:
        yield text.heading()
    name = "the ring"
    old: list[dict[str, object]] | None = []
    last = None
    until = header.head
    for slots, lost, end in news:
        if lost:
            say(f"{lost:,} records were overwritten before they could be read")
        steps = [row for kind, part in rows(from_slots(slots, header, name)) if kind == "step" for row in part]
        if steps:
            last = steps[-1]["step"]
        if old is not None:
            # what was there when we came: the sums take all of it, the screen the last lines
            head = slot_head(slots)
            there = int(((head["kind"] == STEP) & (head["n"] < until)).sum())
            old += steps[:there]
            cut = max(0, len(old) - back)
            for row in old[:cut]:
                text.count(row)
            old = old[cut:]
            if not end and (not len(slots) or int(head["n"][-1]) + 1 < until):
                continue
            steps = old + steps[there:]
            old = None
        for row in steps:
            yield json.dumps({"kind": "step", **row}) if as_json else text.line(row)
        if end:
            what = "no step" if last is None else f"step {last}"
            if end == DIED:
                say(f"the process has died after {what}, without closing the ring: kvhook autopsy {header.pid}")
            else:
                say(f"closed after {what}: the engine was deleted, or the program came to its end")


def _print(line: str) -> None:
    """A line on standard output, at once."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise KvhookError(f"standard output cannot be written: {error.strerror or error}") from None


def _say(text: str) -> None:
    streams.say(f"kvhook tail: {text}")


def _interval(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0.01 <= seconds <= _MOST_SECONDS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0.01 to {_MOST_SECONDS:g}")
    return seconds
