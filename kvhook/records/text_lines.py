"""Files of text that somebody else may have made: no line of them is read further than one of kvhook's can be long."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, AnyStr

from kvhook.errors import TraceFormatError

#: Characters of a line, and bytes of a file of facts. The facts of a run with a million labels are about as long.
LONGEST = 1 << 26


def lines_of(file: IO[AnyStr], name: object) -> Iterator[AnyStr]:
    """The lines of an open file.

    Args:
        file: the file.
        name: what to call it in errors.

    Raises:
        TraceFormatError: a line is too long to be one that kvhook has written.
    """
    number = 0
    while line := file.readline(LONGEST + 1):
        number += 1
        if len(line) > LONGEST:
            raise TraceFormatError(
                f"{name}, line {number}, is longer than {LONGEST >> 20} MiB, which no line of such a file is"
            )
        yield line
