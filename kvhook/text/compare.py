"""Several runs side by side: as a table for a terminal, and in Markdown for a pull request."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePath
from typing import Any

from kvhook.analysis.compare import (
    NOT_JUDGED,
    SAME,
    UNCLEAR,
    Comparison,
    Contrast,
    Row,
    side_by_side,
)
from kvhook.analysis.summary import Summary
from kvhook.text.diagnosis import finding_lines
from kvhook.text.numbers import percent, seconds

_NAME, _CELL, _MOST = 28, 16, 28

#: Unit of a number -> how it is written.
_WRITTEN: dict[str, Callable[[Any], str]] = {
    "": str,
    "name": lambda text: text.rsplit("/", 1)[-1][-(_CELL - 2) :],
    "count": lambda number: f"{number:,.0f}" if number == round(number) else f"{number:,.1f}",
    "rate": lambda number: f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}",
    "s": seconds,
    "share": percent,
}
_RELEASES = """
vLLM counts prefix-cache look-ups differently from release to release: where requests were
preempted or had to wait for blocks, compare hit tokens and computed tokens, not hit rates."""


def table_of(summaries: Sequence[Summary], names: Sequence[str]) -> str:
    """A table of runs without verdicts; ``-`` where a vLLM does not give the number.

    Args:
        summaries: the runs.
        names: what to put over each column; of a path its last part.
    """
    heads = [PurePath(name).stem[:_MOST] for name in names]
    width = max(_CELL, *(len(head) + 2 for head in heads))
    lines = [" " * _NAME + "".join(f"{head:>{width}}" for head in heads)]
    lines += [
        f"{row.label:{_NAME}}" + "".join(f"{cell(row, value):>{width}}" for value in row.values)
        for row in side_by_side(summaries)
    ]
    if len({s.vllm for s in summaries}) > 1:
        lines.append(_RELEASES)
    return "\n".join(lines)


def as_text(c: Comparison) -> str:
    """The whole comparison: one table for each side against the first, the settings that differ, and notes."""
    return "\n".join(_lines(c))


def as_markdown(c: Comparison) -> str:
    """The same for a pull request."""
    return "\n".join(_markdown(c))


def cell(row: Row, value: Any) -> str:
    """A number of a run as text; ``-`` for what is not known."""
    if isinstance(value, str) and row.unit not in ("", "name"):
        return value  # a word in the place of a number
    return (value is not None and _WRITTEN[row.unit](value)) or "-"


# ---- a terminal ----------------------------------------------------------------------------------------------------


def _lines(c: Comparison) -> Iterator[str]:
    for letter, name, repeats in zip(c.letters, c.names, c.repeats, strict=True):
        yield f"{letter}  {name}{f' ({repeats} repeats: their mean)' if repeats > 1 else ''}"
    for place in range(1, len(c.letters)):
        yield ""
        yield from _table(c, place)
    yield ""
    yield from _settings(c)
    yield ""
    yield f"Intervals hold together with {percent(c.confidence, 0)}; steps that depend on each other are accounted for."
    yield from c.notes
    for letter, findings in zip(c.letters, c.findings, strict=False):
        for i, line in enumerate(finding_lines(findings, 3)):
            if not i:
                yield ""
            yield f"{'' if i else letter:3}{line}"


def _table(c: Comparison, place: int) -> Iterator[str]:
    first, letter = c.letters[0], c.letters[place]
    heads = (first, letter, f"{letter} - {first}", f"{letter} / {first}")
    yield " " * 26 + "".join(f"{head:>{width}}" for head, width in zip(heads, _WIDTHS, strict=True))
    for row in c.rows:
        contrast = row.contrasts[place - 1]
        cells = (cell(row, row.values[0]), cell(row, row.values[place]), _difference(row, contrast), _ratio(contrast))
        numbers = "".join(f"{text:>{width}}" for text, width in zip(cells, _WIDTHS, strict=True))
        yield f"{row.label:26}{numbers}  {_verdict(row, contrast, letter)}".rstrip()


_WIDTHS = (14, 14, 14, 8)


def _difference(row: Row, contrast: Contrast) -> str:
    if contrast.difference is None:
        return ""
    return _signed(row, contrast.difference) if contrast.difference else "0"


def _signed(row: Row, value: float) -> str:
    sign = "+" if value > 0 else "-" if value < 0 else ""
    if row.unit == "share":
        return f"{sign}{100 * abs(value):.1f} pp"
    return f"{sign}{_WRITTEN[row.unit](abs(value))}"


def _ratio(contrast: Contrast) -> str:
    if contrast.ratio is None:
        return ""
    return f"{contrast.ratio:.2f}" if contrast.ratio < 100 else f"{contrast.ratio:,.0f}"


def _verdict(row: Row, contrast: Contrast, letter: str) -> str:
    if contrast.verdict == SAME:
        return "the same" if row.contrasts and row.unit not in ("", "name") else ""
    if contrast.verdict == NOT_JUDGED or contrast.low is None or contrast.high is None:
        return ""
    interval = f"{_signed(row, contrast.low)} to {_signed(row, contrast.high)}"
    if contrast.verdict == UNCLEAR:
        return f"no clear difference ({interval})"
    return f"{letter} is {contrast.verdict} ({interval})"


def _settings(c: Comparison) -> Iterator[str]:
    if not c.settings:
        yield "The engines' settings are the same, as far as they are recorded."
        return
    yield "Settings that differ"
    for setting in c.settings:
        values = (f"{letter} {_values(v)}" for letter, v in zip(c.letters, setting.values, strict=True))
        yield f"  {setting.name:24}{', '.join(values)}"


def _values(values: Sequence[Any]) -> str:
    return " and ".join(map(str, values)) or "?"


# ---- Markdown ------------------------------------------------------------------------------------------------------


def _markdown(c: Comparison) -> Iterator[str]:
    for place in range(1, len(c.letters)):
        first, letter = c.letters[0], c.letters[place]
        names = [
            f"{c.letters[i]}: {_plain(c.names[i])}{f' ({c.repeats[i]} repeats)' if c.repeats[i] > 1 else ''}"
            for i in (0, place)
        ]
        yield f"| | {' | '.join(names)} | {letter} - {first} | {letter} / {first} | verdict |"
        yield "|---|---:|---:|---:|---:|---|"
        for row in c.rows:
            contrast = row.contrasts[place - 1]
            cells = [
                row.label,
                *(_plain(cell(row, row.values[i])) for i in (0, place)),
                _difference(row, contrast),
                _ratio(contrast),
                _verdict(row, contrast, letter),
            ]
            yield f"| {' | '.join(cells)} |"
        yield ""
    if c.settings:
        yield f"| setting | {' | '.join(c.letters)} |"
        yield "|---|" + "---|" * len(c.letters)
        for setting in c.settings:
            yield f"| {setting.name} | {' | '.join(_plain(_values(v)) for v in setting.values)} |"
    else:
        yield "The engines' settings are the same, as far as they are recorded."
    yield ""
    yield f"Intervals hold together with {percent(c.confidence, 0)}. {' '.join(c.notes)}".rstrip()
    if any(c.findings):
        yield ""
    for letter, findings in zip(c.letters, c.findings, strict=False):
        yield from (f"- {letter}: {_plain(f.text)} Setting: {_plain(f.setting)}" for f in findings)


def _plain(text: str) -> str:
    """Text that Markdown and HTML show as it is, in a cell of a table."""
    one_line = " ".join(text.split())
    return re.sub(r"([\\`*_{}\[\]<>|#&~!])", r"\\\1", one_line)
