"""Engines that share their parts: a copy of an engine, or one that took over the state of another."""

from __future__ import annotations

import weakref
from typing import Any

from kvhook.hooks.existing import engines_alive
from kvhook.hooks.registry import registry


def note_part(engine: Any) -> None:
    """Remember what an engine that is recorded has of its own: its copies are known by it."""
    part = _part_of(engine)
    key, parts = id(part), registry.parts
    try:
        parts[key] = weakref.ref(part, lambda _: parts.pop(key, None)), id(engine)
    except TypeError:
        return  # somebody's own, to which there are no weak references; None is such a thing, too


def original_of(engine: Any) -> int | None:
    """The id of the engine that was recorded with the part that this one has: itself, or the one that it is a copy of.

    `registry.GONE` if that one is not recorded any more, None if none ever was.
    """
    part = _part_of(engine)
    alive, whose = registry.parts.get(id(part), (None, None))
    return whose if alive is not None and alive() is part else None


def copies_of(engine: Any) -> list[Any]:
    """Other engines with the same part."""
    part = _part_of(engine)
    return [] if part is None else [e for e in engines_alive() if e is not engine and _part_of(e) is part]


def _part_of(engine: Any) -> Any:
    """The client of V1's engine core, or V0's executor."""
    return getattr(engine, "engine_core", None) or getattr(engine, "model_executor", None)
