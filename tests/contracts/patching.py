"""What stands behind the names of the stand-ins, to see what was patched and that it was put back."""

from __future__ import annotations

import types
from typing import Any


def everything(modules: dict[str, types.ModuleType]) -> dict[tuple[str, str], Any]:
    """Each object behind a name of a module or of a class in it."""
    found: dict[tuple[str, str], Any] = {}
    for module in modules.values():
        for name, value in vars(module).items():
            found[module.__name__, name] = value
            if isinstance(value, type) and value.__module__ == module.__name__:
                found |= {(f"{module.__name__}:{name}", n): v for n, v in vars(value).items()}
    return found


def same(one: dict[tuple[str, str], Any], other: dict[tuple[str, str], Any]) -> bool:
    return one.keys() == other.keys() and all(one[name] is other[name] for name in one)
