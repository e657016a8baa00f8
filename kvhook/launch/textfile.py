"""``kvhook run --textfile``: a file for node_exporter's textfile collector, written anew while the program runs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from kvhook.discovery.watch import Wanted, Watch
from kvhook.files import written_beside
from kvhook.streams import say
from kvhook.text.prometheus import as_text

#: Seconds between two files, and of the window that they tell about.
EVERY, WINDOW = 5.0, 15.0
#: Seconds between two looks at the rings: often enough that a ring does not come round meanwhile.
LOOK = 0.5


class Textfile:
    """Writes the file now and then.

    Args:
        path: of the file.
        places: gives the directories of rings.
        wanted: whether a process is one of the program's.
    """

    def __init__(self, path: Path, places: Callable[[], Iterable[Path]], wanted: Wanted, every: float = EVERY) -> None:
        self._path, self._every = path, every
        self._watch = Watch(places, wanted)
        self._written = time.monotonic()
        self._failed = False

    def look(self) -> None:
        """Take in what has come, and write the file if it is time."""
        self._watch.refresh()
        if time.monotonic() - self._written >= self._every:
            self.write()

    def write(self) -> None:
        """Write the file. An error is said once; the program is not disturbed."""
        self._written = time.monotonic()
        try:
            replace_text(self._path, as_text(self._watch.views(WINDOW)))
        except OSError as error:
            if not self._failed:
                say(f"kvhook run: cannot write {self._path}: {error.strerror or error}")
            self._failed = True

    def close(self) -> None:
        """Write it for the last time."""
        self._watch.refresh()
        self.write()
        self._watch.close()


def replace_text(path: Path, text: str) -> None:
    """Put a text in the place of a file in one go, readable for others as node_exporter is another user."""
    with written_beside() as (opener, _):
        file = opener(path)
        os.fchmod(file.fileno(), 0o644)
        file.write(text.encode())
