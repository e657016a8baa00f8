"""Several runs side by side: one line per number, one column per run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Any

from kvhook.analysis.compare import Row, compare
from kvhook.analysis.summary import Summary
from kvhook.text.numbers import percent, seconds

_NAME, _CELL, _MOST = 28, 16, 28

#: Unit of a number -> how it is written.
_WRITTEN: dict[str, Callable[[Any], str]] = {
    "": str,
    "name": lambda text: text.rsplit("/", 1)[-1][-(_CELL - 2) :],
    "count": lambda number: f"{number:,.0f}",
    "s": seconds,
    "share": percent,
}


def side_by_side(summaries: Sequence[Summary], names: Sequence[str]) -> str:
    """A table of runs; ``-`` where a vLLM does not give the number.

    Args:
        summaries: the runs.
        names: what to put over each column; of a path its last part.
    """
    heads = [PurePath(name).stem[:_MOST] for name in names]
    width = max(_CELL, *(len(head) + 2 for head in heads))
    lines = [" " * _NAME + "".join(f"{head:>{width}}" for head in heads)]
    lines += [
        f"{row.name:{_NAME}}" + "".join(f"{_cell(row, value):>{width}}" for value in row.values)
        for row in compare(summaries)
    ]
    if len({s.vllm for s in summaries}) > 1:
        lines.append("\nvLLM counts prefix-cache look-ups differently from release to release: where requests were")
        lines.append("preempted or had to wait for blocks, compare hit tokens and computed tokens, not hit rates.")
    return "\n".join(lines)


def _cell(row: Row, value: Any) -> str:
    if isinstance(value, str) and row.unit not in ("", "name"):
        return value  # a word in the place of a number
    return (value is not None and _WRITTEN[row.unit](value)) or "-"
