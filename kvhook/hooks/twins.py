"""Engines that share their parts: a copy of an engine, or one that took over the state of another."""

from __future__ import annotations

from typing import Any

from kvhook.hooks.registry import registry


def note_part(engine: Any) -> None:
    """Remember what an engine that is recorded has of its own: its copies are known by it."""
    part = _part_of(engine)
    if part is not None:
        registry.parts[part] = id(engine)


def original_of(engine: Any) -> int | None:
    """The id of the engine whose part this one has, alive or not; None if it was never recorded."""
    part = _part_of(engine)
    return None if part is None else registry.parts.get(part)


def _part_of(engine: Any) -> Any:
    """The client of V1's engine core, or V0's executor."""
    return getattr(engine, "engine_core", None) or getattr(engine, "model_executor", None)
