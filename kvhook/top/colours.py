"""The colours of the live screen: the terminal's own sixteen, so that they suit whatever background it has."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from rich.text import Text

#: From so much usage on, the bar and the history are yellow, and red.
HIGH, FULL = 0.75, 0.95
#: Characters before what a line of the details says.
_LABEL = 12

#: What a part of the screen looks like -> the colour of the pattern's group. A later rule covers an earlier one.
_RULES = tuple(
    (re.compile(pattern, re.MULTILINE), style)
    for pattern, style in (
        (r"^( +pid .*)$", "bright_black"),
        (r"^(> .*)$", "bold"),
        (r"^(---.*)$", "bright_black"),
        (r"^--- (.+?) -{2,}", "bold"),
        (r"^([A-Za-z][a-zA-Z/ ]{9} )(?= )", "cyan"),
        (r"^[> ] +\d+ +\d+ +(dead)\b", "red"),
        (r"^[> ] +\d+ +\d+ +(asleep|paused|closed)\b", "blue"),
        (r"(its process has died: .*)$", "red"),
        (r"([1-9][\d,]* records missed here)", "yellow"),
        (r"^limited by .*\n {12}(.*)$", "yellow"),
        (r"^KV cache +([█#]+)", "usage"),
        (r"^KV cache +[█#]*([▒=]+)", "blue"),
        (r"^KV cache +[█#▒=]*([·.]+)", "bright_black"),
    )
)


def coloured(lines: Sequence[str], usage: float | None) -> Text:
    """The lines of a screen with colours.

    Args:
        lines: what `kvhook.text.live.screen` gives, with a heading.
        usage: KV cache usage of the engine that is shown in detail.
    """
    text = Text("\n".join(lines), no_wrap=True, overflow="crop")
    level = "green" if usage is None or usage < HIGH else "yellow" if usage < FULL else "red"
    for pattern, style in _RULES:
        for found in pattern.finditer(text.plain):
            text.stylize(level if style == "usage" else style, *found.span(1))
    for begin, end in _history(lines):
        text.stylize(level, begin, end)
    if lines:  # a terminal that is one row high has none for them
        text.stylize("bold", 0, len(lines[0]))
    return text


def _history(lines: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Where the history is drawn: in its own line, and in those below that have no label."""
    begin, inside = 0, False
    for line in lines:
        inside = line.startswith("history") or (inside and line.startswith(" " * _LABEL))
        if inside:
            yield begin + _LABEL, begin + len(line)
        begin += len(line) + 1
