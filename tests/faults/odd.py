"""What can go wrong at a seam: errors of every kind, and values of no kind that is wanted."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from typing import Any


class Quitting(BaseException):
    """Neither an Exception nor one of those that are meant for the user's program."""


class Unprintable(Exception):
    """Its text cannot be had."""

    def __str__(self) -> str:
        raise RuntimeError("there is no text")


#: Errors that end at the seam.
CONTAINED: dict[str, Callable[[], BaseException]] = {
    "Exception": lambda: ValueError("injected"),
    "BaseException": lambda: Quitting("injected"),
    "MemoryError": MemoryError,
    "RecursionError": lambda: RecursionError("injected"),
    "unprintable": Unprintable,
    "StopIteration": StopIteration,
}
#: Those that go on to the user's program.
PASSED_ON: dict[str, Callable[[], BaseException]] = {"KeyboardInterrupt": KeyboardInterrupt, "SystemExit": SystemExit}

#: Values where there was another.
VALUES: dict[str, Any] = {
    "text": "no number",
    "None": None,
    "list": [1, 2],
    "object": object(),
    "NaN": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "huge": 1 << 80,
    "-huge": -(1 << 80),
    "64 bits": (1 << 63) - 1,
    "negative": -5,
    "True": True,
    "bytes": b"\xff",
}

#: Seconds that a value takes. KVHOOK_BLOCKED_SECONDS=1 for the long form.
BLOCKED = float(os.environ.get("KVHOOK_BLOCKED_SECONDS") or 0.05)

#: Name of a behaviour -> what happens in place of giving the value.
BEHAVIOURS: dict[str, Callable[[Any], Any]] = {}


def _raising(make: Callable[[], BaseException]) -> Callable[[Any], Any]:
    def act(value: Any) -> Any:
        raise make()

    return act


def _giving(instead: Any) -> Callable[[Any], Any]:
    return lambda value: instead


def _slow(value: Any) -> Any:
    time.sleep(BLOCKED)
    return value


BEHAVIOURS |= {name: _raising(make) for name, make in (CONTAINED | PASSED_ON).items()}
BEHAVIOURS |= {name: _giving(instead) for name, instead in VALUES.items()}
BEHAVIOURS["blocks"] = _slow


class Odd:
    """Stands for an object, of which one attribute behaves oddly: as a behaviour says, or a function of the value."""

    def __init__(self, real: Any, attribute: str, behaviour: str | Callable[[Any], Any]) -> None:
        act = BEHAVIOURS[behaviour] if isinstance(behaviour, str) else behaviour
        vars(self).update(_real=real, _attribute=attribute, _act=act)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._real, name)
        return self._act(value) if name == self._attribute else value

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._real, name, value)


def odd_function(real: Callable[..., Any], behaviour: str) -> Callable[..., Any]:
    """A function of which the result behaves oddly. What it does, it does."""

    def act(*args: Any, **kwargs: Any) -> Any:
        return BEHAVIOURS[behaviour](real(*args, **kwargs))

    return act
