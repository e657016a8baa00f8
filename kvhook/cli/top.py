"""``kvhook top``."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvhook.cli.common import add_dir
from kvhook.errors import KvhookError

if TYPE_CHECKING:
    from kvhook.analysis.live import View
    from kvhook.discovery.watch import Watch


class TopCommand:
    """Show what the engines on this machine do, live.

    Of every engine that is being recorded, or of the processes PID and all that they started: how full the KV cache is,
    who runs and waits, tokens per second, the hit rate, latencies of the last seconds, what limits the batch. It only
    reads the rings, and costs the engines nothing. The screen needs textual: pip install "kvhook[top]"; --once does
    not.

    Example:
      $ kvhook top --once
             pid eng  state   run  wait      KV    hits prefill/s decode/s  TTFT p50
            4736   0  alive     7     5  81.8 %  39.8 %       120      890    178 ms
      --- 4736 serve.py tiny-llama -----------------------------------------------
      KV cache    ####################.... used 81.8 %, cached 9.1 %, empty 9.1 % of 11 blocks
      ...
    """

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument(
            "pids", metavar="PID", nargs="*", type=int, help="only these processes and what they started"
        )
        parser.add_argument("--once", action="store_true", help="print what there is, and end")
        parser.add_argument("--ascii", action="store_true", help="draw with plain characters")
        add_dir(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Show it until the user quits."""
        from kvhook.discovery.watch import Watch, one_of
        from kvhook.ring.directory import directories
        from kvhook.text.bar import shows_blocks

        watch = Watch(lambda: directories(args.dir), one_of(args.pids))
        ascii_only = args.ascii or not shows_blocks()

        def nothing() -> list[str]:
            return _why_nothing(watch, args.pids, args.dir)

        try:
            watch.refresh()
            if args.once:
                _print(watch, ascii_only, nothing)
                return 0
            for stream, name in ((sys.stdout, "this"), (sys.__stdin__, "standard input")):
                if stream is None or not stream.isatty():
                    raise KvhookError(
                        f"{name} is no terminal; --once prints what there is, kvhook tail a line per step"
                    )
            if sys.__stderr__ is None or not sys.__stderr__.isatty():
                _print(watch, ascii_only, nothing)  # a message would go where nobody looks
                print("\nThis was printed once: the live screen is drawn on standard error, which is no terminal here.")
                return 0
            return _show(watch, ascii_only, nothing)
        finally:
            watch.close()


def _print(watch: Watch, ascii_only: bool, nothing: Callable[[], list[str]]) -> None:
    """What there is, once."""
    from kvhook.text.live import detail, screen

    views, width = watch.views(10.0), max(80, shutil.get_terminal_size().columns)
    lines = screen(views, 0, width, 40 + len(views), ascii_only=ascii_only) if views else nothing()
    print(*lines, sep="\n")
    for view in views[1:]:
        print(*detail(view, width, ascii_only=ascii_only), sep="\n")


def _why_nothing(watch: Watch, pids: Sequence[int], folder: Path | None) -> list[str]:
    """What is said if no engine is shown: what was asked for, and what there is."""
    from kvhook.discovery.rings import ALIVE, glance
    from kvhook.ring.directory import directories, ring_files
    from kvhook.ring.place import process_start
    from kvhook.text.live import no_engine

    others = set(watch.others)
    if folder:
        elsewhere = [ring for ring, header in map(glance, ring_files(directories())) if header is not None]
        others |= {ring.pid for ring in elsewhere if ring.state == ALIVE}
    gone = [pid for pid in pids if os.path.isdir("/proc/self") and not process_start(pid)]
    there = folder is None or Path(folder).is_dir()
    return no_engine(pids, gone, "" if folder is None else str(folder), sorted(others), there)


def _show(watch: Watch, ascii_only: bool, nothing: Callable[[], list[str]]) -> int:
    if os.environ.get("TERM", "dumb") in ("dumb", "unknown"):
        os.environ.setdefault("NO_COLOR", "1")  # textual looks at it when it is imported
    try:
        from kvhook.top.app import Top
    except ImportError as error:
        raise KvhookError(f'the live screen needs textual ({error}): pip install "kvhook[top]"; or --once') from None

    turn = threading.Lock()

    def look(window: float) -> list[View]:
        with turn:
            watch.refresh()
            return watch.views(window)

    def why() -> list[str]:
        with turn:
            return nothing()

    Top(look, ascii_only=ascii_only, nothing=why).run()
    for view in look(10.0):
        if view.state in ("closed", "dead"):
            print(f"process {view.pid}, engine {view.engine}: {view.state} after {view.steps:,} steps")
    return 0
