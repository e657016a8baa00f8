"""``--fail-if``: what verbs share that can fail a job."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kvhook.errors import KvhookError
from kvhook.streams import say

if TYPE_CHECKING:
    from kvhook.analysis.conditions import Condition
    from kvhook.analysis.summary import Summary

#: The exit code of a verb whose condition holds: neither a mistake (1) nor wrong usage (2).
CONDITION_HOLDS = 3


def add_fail_if(parser: argparse.ArgumentParser, example: str) -> None:
    """Declare ``--fail-if``."""
    parser.add_argument(
        "--fail-if",
        metavar="CONDITION",
        action="append",
        default=[],
        type=_condition,
        help=f"exit code {CONDITION_HOLDS} if this is true, such as {example!r}; may be given several times",
    )


def _condition(text: str) -> Condition:
    from kvhook.analysis.conditions import read_condition

    try:
        return read_condition(text)
    except KvhookError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def failed(conditions: Sequence[Condition], sides: Mapping[str, Sequence[Summary]]) -> bool:
    """Whether a condition holds; says on stderr which. A name without a side stands for each side in turn.

    Args:
        conditions: those that were given.
        sides: letter -> its run, or several repeats of it. Of these the mean counts.

    Raises:
        KvhookError: a number is not known, or there is no such side.
    """
    held = False
    for condition in conditions:
        unknown = {side for side, _ in condition.names if side and side not in sides}
        if unknown:
            raise KvhookError(f"{condition.text!r}: there is no {min(unknown)}; there are {', '.join(sides)}")
        for letter in sides if any(not side for side, _ in condition.names) else [next(iter(sides))]:
            try:
                holds = condition.holds(functools.partial(_look, sides, letter))
            except KvhookError as error:
                raise KvhookError(f"{condition.text!r}: {error}") from None
            if holds:
                held = True
                say(f"{condition.text}: true{_values(condition, sides, letter)}")
    return held


def _look(sides: Mapping[str, Sequence[Summary]], here: str, side: str, name: str) -> float:
    return _number(sides, side or here, name)


def _number(sides: Mapping[str, Sequence[Summary]], side: str, name: str) -> float:
    from kvhook.analysis.numbers import numbers_of, why_unknown

    values = []
    for summary in sides[side]:
        value = numbers_of(summary)[name]
        if value is None:
            of = f" of {side}" if len(sides) > 1 else ""
            raise KvhookError(f"{name}{of} is not known: {why_unknown(summary, name)}")
        values.append(value)
    return sum(values) / len(values)


def _values(condition: Condition, sides: Mapping[str, Sequence[Summary]], here: str) -> str:
    """The numbers that made it true."""
    shown = []
    for side, name in condition.names:
        letter = side or here
        try:
            value = f"{_number(sides, letter, name):.6g}"
        except KvhookError:  # of the part that did not matter
            value = "not known"
        shown.append(f"{f'{letter}.' if len(sides) > 1 else ''}{name} is {value}")
    return f" ({', '.join(shown)})" if shown else ""
