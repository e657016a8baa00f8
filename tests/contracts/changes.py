"""Changes of a release's facts, for `mutated`: something has another name, takes other arguments, or is gone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def rename(module: str, cls: str, old: str, new: str) -> Callable[[dict[str, Any]], None]:
    """A field, an attribute or a method gets another name."""

    def change(raw: dict[str, Any]) -> None:
        facts = raw["modules"][module]["classes"][cls]
        for field in [*facts.get("fields", ()), *facts.get("attributes", ())]:
            if field["name"] == old:
                field["name"] = new
        for table in ("methods", "properties"):
            if old in facts.get(table, {}):
                facts[table][new] = facts[table].pop(old)

    return change


def resign(module: str, cls: str, method: str, old: str, new: str) -> Callable[[dict[str, Any]], None]:
    """A method takes other arguments."""

    def change(raw: dict[str, Any]) -> None:
        facts = raw["modules"][module]["classes"][cls]["methods"][method]
        assert old in facts["signature"]
        facts["signature"] = facts["signature"].replace(old, new)

    return change


def drop(module: str, table: str, name: str) -> Callable[[dict[str, Any]], None]:
    """A class or an import is gone."""

    def change(raw: dict[str, Any]) -> None:
        del raw["modules"][module][table][name]

    return change
