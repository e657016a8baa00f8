"""Checks of kvhook on the machine it is to be used on: a list of small functions, each with a line and a verdict.

A check is a function whose docstring is its title. It gives what it found, as text; raises `Failed` if that is wrong,
and `Skipped` if it cannot be found out here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

OK, FAILED, SKIPPED = "ok", "FAILED", "skipped"

Check = Callable[[], str]


class Failed(Exception):
    """A check failed; the message says what was found instead of what."""


class Skipped(Exception):
    """A check does not apply here; the message says why."""


class Result(NamedTuple):
    """One check: its title, `OK`, `FAILED` or `SKIPPED`, what it found, and what it took in seconds."""

    title: str
    outcome: str
    found: str
    seconds: float


def run(checks: Sequence[Check]) -> Iterator[Result]:
    """Run checks one after the other. One that raises has failed, and the next one is run."""
    for check in checks:
        began = time.perf_counter()
        try:
            outcome, found = OK, check()
        except Skipped as error:
            outcome, found = SKIPPED, str(error)
        except Failed as error:
            outcome, found = FAILED, str(error)
        except Exception as error:
            outcome, found = FAILED, f"{type(error).__name__}: {error}"
        yield Result((check.__doc__ or check.__name__).strip().rstrip("."), outcome, found, time.perf_counter() - began)


def expect(what: str, found: Any, expected: Any) -> None:
    """Raises `Failed` unless both are equal."""
    if found != expected:
        raise Failed(f"{what}: {found!r} instead of {expected!r}")
