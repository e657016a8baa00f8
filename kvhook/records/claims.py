"""Which engines of a run an engine core may be of: a fact of the core's, ``of_engines``.

A core is told to be of the engines whose trace lies beside its files. Without the fact it may be of any.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def claimed_by(facts: Mapping[str, Any]) -> frozenset[int] | None:
    """The engines of the run that a core may be of, out of its facts; None if they do not say it."""
    of = facts.get("of_engines")
    return frozenset(n for n in of if type(n) is int) if isinstance(of, list) else None


def claim(facts: dict[str, Any], engines: Iterable[int] | None) -> None:
    """Say of which engines of the run a core may be."""
    facts.pop("of_engines", None)
    if engines is not None:
        facts["of_engines"] = sorted(engines)
