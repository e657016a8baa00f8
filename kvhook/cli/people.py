"""What verbs print goes through here on its way to the terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, cast

from kvhook import streams
from kvhook.errors import shown


class Shown:
    """A stream whose text cannot move the cursor of the terminal that it goes to: names of files are somebody's.

    Args:
        stream: where the text goes.
        to_the_end: if it is a pipe whose reader has gone, what is written goes nowhere, and no error is raised.
    """

    def __init__(self, stream: TextIO, to_the_end: bool) -> None:
        self._stream, self._to_the_end = stream, to_the_end

    def write(self, text: str) -> int:
        """Write it, with a question mark for each control character."""
        with self._reader_may_have_gone():
            self._stream.write(shown(text))
        return len(text)

    def flush(self) -> None:
        """Write what has been kept back."""
        with self._reader_may_have_gone():
            self._stream.flush()

    def writelines(self, lines: Iterable[str]) -> None:
        """The same with several texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _reader_may_have_gone(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            if not self._to_the_end:
                raise
            streams.discard(self._stream)


@contextlib.contextmanager
def for_people(to_the_end: bool) -> Iterator[None]:
    """What is printed inside is `Shown`. Where a standard stream is closed, it stays so."""
    out, err = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (
        cast(TextIO, Shown(stream, to_the_end) if stream is not None else None) for stream in (out, err)
    )
    try:
        yield
    finally:
        sys.stdout, sys.stderr = out, err
