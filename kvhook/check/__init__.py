"""Checks of the collector on the machine where it is to be used: small functions, each with one line and an outcome.

A check is a function: its name is what it is called by, the first line of its docstring is its title. It gives what it
found, as text; it raises `Failed` where something is wrong, `Skipped` where it cannot be found out here.
`kvhook.check.structure` needs no vLLM, `kvhook.check.inference` starts one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

OK, FAILED, SKIPPED = "ok", "FAILED", "skipped"

Check = Callable[[], str]

#: What to do about a failure that no setting of the user's explains.
REPORT = "report it, with the output of `kvhook doctor --json` and of this check with --json"


class Failed(Exception):
    """A check failed.

    Args:
        what: the thing that was looked at.
        expected: what it should have been.
        seen: what it was.
        advice: what the reader is to do about it.
    """

    def __init__(self, what: str, expected: str, seen: str, advice: str = REPORT) -> None:
        super().__init__(f"{what}: expected {expected}, saw {seen}. To do: {advice}")
        self.expected, self.seen, self.advice = expected, seen, advice


class Skipped(Exception):
    """A check cannot be made here; the message says why."""


class Result(NamedTuple):
    """One check: what it is called, its title, `OK`, `FAILED` or `SKIPPED`, and a text: what it found.

    ``expected``, ``seen`` and ``advice`` are those of a failure, "" otherwise. ``seconds`` is what it took.
    """

    name: str
    title: str
    outcome: str
    found: str
    expected: str
    seen: str
    advice: str
    seconds: float


def run(checks: Iterable[Check]) -> Iterator[Result]:
    """Run checks one after the other. One that raises has failed, and the next is run all the same."""
    for check in checks:
        began = time.perf_counter()
        failed = None
        try:
            outcome, found = OK, check()
        except Skipped as error:
            outcome, found = SKIPPED, str(error)
        except Failed as error:
            outcome, found, failed = FAILED, str(error), error
        except Exception as error:  # also what a check did not think of is an answer, and not the end of the others
            failed = Failed("the check itself", "no error", f"{type(error).__name__}: {error}")
            outcome, found = FAILED, str(failed)
        details = (failed.expected, failed.seen, failed.advice) if failed else ("", "", "")
        yield Result(check.__name__, _title(check), outcome, found, *details, time.perf_counter() - began)


def expect(what: str, seen: Any, expected: Any, advice: str = REPORT) -> None:
    """Raises `Failed` unless both are equal."""
    if seen != expected:
        raise Failed(what, repr(expected), repr(seen), advice)


def verdict(results: list[Result]) -> str:
    """All of them in one line."""
    failed = [r.title for r in results if r.outcome == FAILED]
    skipped = sum(r.outcome == SKIPPED for r in results)
    more = f", {skipped} skipped" if skipped else ""
    if failed:
        return f"FAILED: {len(failed)} of {len(results)} checks ({', '.join(failed)}){more}"
    return f"passed: {len(results) - skipped} of {len(results)} checks{more}"


def _title(check: Check) -> str:
    return (check.__doc__ or check.__name__).strip().split("\n", 1)[0].rstrip(".")
