"""Objects as vLLM never makes them, or not yet: all that a number, a list or a stats object could turn out to be.

All is drawn from a `random.Random`: from the same seed come the same objects again, but not the same ones. So each of
two publishers gets its own, and an attribute that changes with each read shows which of them read it once more.
"""

from __future__ import annotations

import decimal
import enum
import fractions
import random
import types
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

Values = Callable[[random.Random], Any]


class Reason(enum.IntEnum):
    STOP, LENGTH, ABORT = range(3)


class IntWithRules(int):
    """An int that adds, and indexes, in its own way."""

    def __add__(self, other: Any) -> int:
        return 1000 + int(self) + int(other)

    __radd__ = __add__

    def __index__(self) -> int:
        return 77


class FloatWithRules(float):
    def __mul__(self, other: Any) -> float:
        return -1.5

    def __float__(self) -> float:
        return 3.25


class Index:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __index__(self) -> int:
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


class AsFloat:
    def __float__(self) -> float:
        return 0.125


class Untrue:
    def __bool__(self) -> bool:
        raise RuntimeError("neither true nor false")

    def __len__(self) -> int:
        return 3


class OddSize:
    def __init__(self, size: Any) -> None:
        self.size = size

    def __len__(self) -> int:
        if isinstance(self.size, Exception):
            raise self.size
        return self.size


class ListOfOnes(list[Any]):
    """A list whose items are not what it is iterated as."""

    def __iter__(self) -> Any:
        return iter([1.0] * len(self))


def plain_int(r: random.Random) -> Any:
    return r.choice((0, 1, 5, 17, 256, 257, 12345, -1, -5))


def plain_float(r: random.Random) -> Any:
    return r.choice((0.0, 0.5, 1.0, r.random(), r.uniform(-1e6, 1e6)))


def odd_number(r: random.Random) -> Any:
    """A number, or what stands where one should be."""
    huge = (2**31, 2**53, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**64, 10**30, -(10**400))
    floats = (-0.0, float("nan"), float("inf"), -float("inf"), 1e308, 5e-324, 9.1e18, 9.3e18, -9.4e18)
    makers: tuple[Callable[[], Any], ...] = (
        lambda: r.choice(huge),
        lambda: r.choice(floats),
        lambda: r.choice((True, False)),
        lambda: None,
        lambda: r.choice(("", "17", "text", "²", b"7", "9" * 25)),
        lambda: np.int64(r.randrange(-9, 9)),
        lambda: np.float64(r.random()),
        lambda: np.float32(r.random()),
        lambda: np.array([1, 2]),
        lambda: np.uint64(2**64 - 1),
        lambda: r.choice(list(Reason)),
        lambda: IntWithRules(r.randrange(9)),
        lambda: FloatWithRules(r.random()),
        lambda: Index(r.choice((3, -3, 2**70, ValueError("no index"), "three"))),
        AsFloat,
        lambda: decimal.Decimal("1.5"),
        lambda: fractions.Fraction(1, 3),
        lambda: 1j,
        object,
        Untrue,
        lambda: [1, 2],
        lambda: OddSize(r.choice((0, 4, -1, 2**70, RuntimeError("no length")))),
    )
    return r.choice(makers)()


def number(r: random.Random, odd: float) -> Any:
    """Mostly a plain number."""
    if r.random() < odd:
        return odd_number(r)
    return plain_float(r) if r.random() < 0.3 else plain_int(r)


def latencies(r: random.Random, odd: float) -> Any:
    """A list of latencies, and now and then something else."""
    size = r.choice((0, 1, 2, 3, 8, 16, 17, 40, 64, 130, 600)) if r.random() < 0.9 else r.randrange(1300)
    few = [r.random() for _ in range(3)]
    kind = r.random()
    values: list[Any]
    if kind < 0.3:
        values = [0.0125] * size
    elif kind < 0.6:
        values = [r.choice(few) for _ in range(size)]
    else:
        values = [r.uniform(-1.0, 1.0) for _ in range(size)]
    if values and r.random() < odd:
        for _ in range(r.randrange(1, 4)):
            values[r.randrange(size)] = r.choice((-0.0, 0.0, float("nan"), float("inf"), odd_number(r), 3, True))
    if r.random() >= odd:
        return values
    makers: tuple[Callable[[], Any], ...] = (
        lambda: tuple(values),
        lambda: ListOfOnes(values),
        lambda: dict.fromkeys(values) if all(isinstance(v, float) for v in values) else {},
        lambda: iter(values),
        lambda: np.array([0.5] * (size % 5)),
        lambda: "latencies",
        lambda: None,
        lambda: 3,
        Untrue,
    )
    return r.choice(makers)()


def holder(r: random.Random, members: dict[str, Any], odd: float) -> Any:
    """An object with these attributes: of one of the kinds that objects come in."""
    if r.random() < odd:
        for name in r.sample(sorted(members), min(len(members), r.choice((1, 1, 2)))):
            del members[name]
    kind = r.random()
    if kind < 0.3:
        return types.SimpleNamespace(**members)
    if kind < 0.5:
        slotted: Any = type("Slotted", (), {"__slots__": (*members, "kvhook_ttft", "kvhook_sample_index")})()
        for name, value in members.items():
            setattr(slotted, name, value)
        return slotted
    if kind < 0.8:
        plain: Any = type("Plain", (), {})()
        plain.__dict__.update(members)
        return plain
    if kind < 0.87:
        return type("OfTheClass", (), members)()
    if kind < 0.94:
        return type("Asked", (), {"__getattr__": lambda self, name: _asked(members, name)})()
    return type("Properties", (), {n: _property(r, v, odd) for n, v in members.items()})()


def _asked(members: dict[str, Any], name: str) -> Any:
    if name not in members:
        raise AttributeError(name)
    return members[name]


def _property(r: random.Random, value: Any, odd: float) -> Any:
    kind = r.random()
    if kind < odd / 2:
        error = r.choice((AttributeError("gone"), ValueError("not now"), KeyboardInterrupt(), ZeroDivisionError()))
        return property(lambda self: _raise(error))
    if kind < odd and type(value) is int:
        reads = iter(range(value, value + 1000))  # another value with each read
        return property(lambda self: next(reads))
    return property(lambda self: value)


def _raise(error: BaseException) -> Any:
    raise error


def many(r: random.Random, make: Callable[[], Any], odd: float) -> Any:
    """Finished requests: a list, and now and then another iterable."""
    items = [make() for _ in range(r.choice((0, 0, 0, 1, 2, 8)))]
    if r.random() >= odd:
        return items
    makers: tuple[Callable[[], Any], ...] = (
        lambda: tuple(items),
        lambda: iter(items),
        lambda: dict(enumerate(items)),
        lambda: None,
        lambda: [*items, None],
        lambda: _stops(items),
    )
    return r.choice(makers)()


class _Stops:
    """Has a length, and raises while it is iterated."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Any:
        yield from self.items
        raise LookupError("no more")


def _stops(items: Iterable[Any]) -> _Stops:
    return _Stops(list(items))
