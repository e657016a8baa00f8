"""What verbs print goes through here on its way to the terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, cast

from kvhook.errors import shown


class Shown:
    """A stream whose text cannot move the cursor of the terminal that it goes to: names of files are somebody's."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write it, with a question mark for each control character."""
        self._stream.write(shown(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """The same with several texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def for_people() -> Iterator[None]:
    """What is printed inside is `Shown`. Where a standard stream is closed, it stays so."""
    out, err = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, Shown(stream) if stream is not None else None) for stream in (out, err))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = out, err
