"""What to type after a run."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

#: The commands for a run in one file, and those for one in several; each with what it is good for.
_ONE = (
    ("kvhook summary {trace}", "these numbers again"),
    ("kvhook report {trace} -o {stem}.html", "charts of everything, in a browser"),
    ("kvhook cache {trace}", "where hits come from, and what misses and preemptions cost"),
    ("kvhook export {trace} {stem}.csv", "every step and every request as tables"),
)
_SEVERAL = (
    ("kvhook summary {traces}", "the processes side by side"),
    ("kvhook report {traces}", "charts of all of them, in a browser"),
    ("kvhook cache {trace}", "one of them: where hits come from, what misses and preemptions cost"),
)
_AUTOPSY = ("kvhook autopsy {trace}", "the last steps, and what changed before the end")
#: So many names are written out.
_MOST = 4


def short(path: Path) -> str:
    """A path as short as it can be typed."""
    with contextlib.suppress(OSError, ValueError):  # there is no current directory any more, or it lies elsewhere
        return str(path.relative_to(Path.cwd()))
    return str(path)


def quoted(text: str) -> str:
    """A name as a shell takes it. What cannot be typed stands in it as its bytes: the shell must know ``$'...'``, as
    bash, zsh and ksh do."""
    if text.isprintable():
        return shlex.quote(text)
    told = (chr(byte) if chr(byte).isprintable() and byte < 127 else f"\\{byte:03o}" for byte in os.fsencode(text))
    return "$'{}'".format("".join({"'": r"\'", "\\": r"\\"}.get(one, one) for one in told))


def next_commands(traces: Sequence[str], *, ended_badly: bool = False) -> str:
    """The files of a run, and the commands that read them.

    Args:
        traces: the files.
        ended_badly: the program did not end well: then how it came to its end is asked first.
    """
    return "\n".join(_lines(traces, ended_badly))


def _lines(traces: Sequence[str], ended_badly: bool) -> Iterator[str]:
    names = [quoted(trace) for trace in traces]
    yield f"recorded in {' '.join(names[:_MOST])}{f' and {len(names) - _MOST} more' if len(names) > _MOST else ''}"
    commands = [*([_AUTOPSY] if ended_badly else []), *(_ONE if len(names) == 1 else _SEVERAL)]
    several = " ".join(names) if len(names) <= _MOST else quoted(str(Path(traces[0]).parent))
    known = {"trace": names[0], "traces": several, "stem": quoted(traces[0].removesuffix(".kvh"))}
    filled = [(command.format(**known), meaning) for command, meaning in commands]
    width = max(len(command) for command, _ in filled)
    for command, meaning in filled:
        yield f"  {command:{width}}  # {meaning}" if width <= 80 else f"  {command}"
