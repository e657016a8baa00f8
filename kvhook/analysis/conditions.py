"""Conditions on the numbers of runs, for a gate in CI: ``B.itl_p99 > 1.1 * A.itl_p99``.

A condition is read by a small parser of its own. There is nothing in it but numbers, names of numbers, arithmetic,
comparisons, ``and``, ``or``, ``not`` and parentheses: nothing that could call anything or reach anything else.
"""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from kvhook.analysis.numbers import NAMES, full_name, unknown_name
from kvhook.errors import KvhookError

#: A condition that is longer, or nested more deeply, is refused.
MOST_CHARACTERS, MOST_DEPTH = 1000, 30

ALLOWED = (
    "a condition may hold numbers (also 80%, 50ms, 20us, 3s), names of numbers (prefix_cache_hit_rate, B.itl_p99), "
    "+ - * /, < <= > >= == !=, and, or, not, and parentheses"
)

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?P<unit>%|us|ms|s)?(?![\w.])"
    r"|(?P<name>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)?)(?![\w.])"
    r"|(?P<sign><=|>=|==|!=|[-+*/<>()]))",
    re.ASCII,
)
_UNITS = {"": 1.0, "%": 1e-2, "s": 1.0, "ms": 1e-3, "us": 1e-6}
_COMPARES: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
_WORDS = ("and", "or", "not")

#: Gives the number that a name stands for: the letter of a side, "" for none, and the name. Raises `KvhookError` where
#: it is not known.
Look = Callable[[str, str], float]
_Number = Callable[[Look], float]
_Truth = Callable[[Look], bool]
_Join = Callable[[float, float], float]


class Condition(NamedTuple):
    """A condition that has been read.

    Args:
        text: as it was written.
        holds: says whether it is true.
        names: the names of numbers in it: letter of a side, "" for none, and name.
    """

    text: str
    holds: _Truth
    names: tuple[tuple[str, str], ...]


def read_condition(text: str) -> Condition:
    """Read a condition.

    >>> read_condition("prefix_cache_hit_rate < 80%").holds(lambda side, name: 0.75)
    True

    Raises:
        KvhookError: it is none; the message says where, and what is allowed.
    """
    if len(text) > MOST_CHARACTERS:
        raise _refused(text, f"it is longer than {MOST_CHARACTERS:,} characters")
    reader = _Reader(text)
    holds = reader.either(0)
    if reader.kind != "end":
        raise reader.unexpected()
    return Condition(text, holds, tuple(dict.fromkeys(reader.names)))


def _refused(text: str, why: str) -> KvhookError:
    shown = text if len(text) <= 100 else f"{text[:100]}..."
    shown = "".join(c if c.isprintable() else "?" for c in shown)
    return KvhookError(f"{shown!r} is not a condition: {why}; {ALLOWED}")


class _Reader:
    """Reads one token ahead. What a method reads is the longest that fits; the weakest operator is read first."""

    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0
        self.names: list[tuple[str, str]] = []
        self.kind = self.value = self.unit = ""
        self._next()

    def _next(self) -> None:
        if not self._text[self._at :].strip():
            self.kind, self.value = "end", ""
            return
        match = _TOKEN.match(self._text, self._at)
        if match is None:
            rest = self._text[self._at :].strip()
            raise _refused(self._text, f"{rest[:20]!r} does not belong there")
        self.kind = str(match.lastgroup if match.lastgroup != "unit" else "number")
        self.value, self.unit = match[self.kind], match["unit"] or ""
        if self.kind == "name" and self.value in _WORDS:
            self.kind = "word"
        self._at = match.end()

    def unexpected(self) -> KvhookError:
        """What to raise at a token that does not fit."""
        what = "it ends too early" if self.kind == "end" else f"{self.value!r} does not belong there"
        return _refused(self._text, what)

    def _take(self, *values: str) -> str:
        """The token, if it is one of these; else ""."""
        if self.kind not in ("sign", "word") or self.value not in values:
            return ""
        value = self.value
        self._next()
        return value

    def _deeper(self, depth: int) -> int:
        if depth >= MOST_DEPTH:
            raise _refused(self._text, f"it is nested more than {MOST_DEPTH} deep")
        return depth + 1

    # ---- true or false ---------------------------------------------------------------------------------------------

    def either(self, depth: int) -> _Truth:
        """Parts with ``or`` between them."""
        parts = list(self._parts(self._both, "or", depth))
        return lambda look: any(part(look) for part in parts)

    def _both(self, depth: int) -> _Truth:
        parts = list(self._parts(self._negated, "and", depth))
        return lambda look: all(part(look) for part in parts)

    def _parts(self, read: Callable[[int], _Truth], word: str, depth: int) -> Iterator[_Truth]:
        yield read(depth)
        while self._take(word):
            yield read(depth)

    def _negated(self, depth: int) -> _Truth:
        if not self._take("not"):
            return self._comparison(depth)
        part = self._negated(self._deeper(depth))
        return lambda look: not part(look)

    def _comparison(self, depth: int) -> _Truth:
        """Two numbers, or a condition in parentheses. Only what follows tells one parenthesis from the other."""
        if self.kind == "sign" and self.value == "(":
            here = self._at, self.kind, self.value, self.unit, len(self.names)
            try:
                return self._between_numbers(depth)
            except KvhookError:
                self._at, self.kind, self.value, self.unit, names = here
                del self.names[names:]
            self._next()
            inside = self.either(self._deeper(depth))
            if not self._take(")"):
                raise self.unexpected()
            return inside
        return self._between_numbers(depth)

    def _between_numbers(self, depth: int) -> _Truth:
        left = self._sum(depth)
        sign = self._take(*_COMPARES)
        if not sign:
            if self.kind == "end":
                raise _refused(self._text, "it compares nothing")
            raise self.unexpected()
        compares, right = _COMPARES[sign], self._sum(depth)
        return lambda look: compares(left(look), right(look))

    # ---- numbers ---------------------------------------------------------------------------------------------------

    def _sum(self, depth: int) -> _Number:
        return self._chain(self._product, {"+": operator.add, "-": operator.sub}, depth)

    def _product(self, depth: int) -> _Number:
        return self._chain(self._signed, {"*": operator.mul, "/": _divided}, depth)

    def _chain(self, read: Callable[[int], _Number], joins: Mapping[str, _Join], depth: int) -> _Number:
        """Numbers with operators between them, reckoned from left to right."""
        first = read(depth)
        more = []
        while sign := self._take(*joins):
            more.append((joins[sign], read(depth)))
        return functools.partial(_reckon, first, more) if more else first

    def _signed(self, depth: int) -> _Number:
        if sign := self._take("-", "+"):
            value = self._signed(self._deeper(depth))
            return (lambda look: -value(look)) if sign == "-" else value
        return self._single(depth)

    def _single(self, depth: int) -> _Number:
        if self.kind == "number":
            number = float(self.value) * _UNITS[self.unit]
            self._next()
            if not math.isfinite(number):
                raise _refused(self._text, "a number in it is too large")
            return lambda look: number
        if self.kind == "name":
            side, _, name = self.value.rpartition(".")
            name = full_name(name)
            if name not in NAMES:
                raise _refused(self._text, unknown_name(self.value.rpartition(".")[2]))
            self.names.append((side, name))
            self._next()
            return lambda look: look(side, name)
        if self._take("("):
            inside = self._sum(self._deeper(depth))
            if not self._take(")"):
                raise self.unexpected()
            return inside
        raise self.unexpected()


def _reckon(first: _Number, more: Sequence[tuple[_Join, _Number]], look: Look) -> float:
    value = first(look)
    for join, number in more:
        value = join(value, number(look))
    return value


def _divided(above: float, below: float) -> float:
    if below == 0:
        raise KvhookError("a number is divided by 0")
    return above / below
