"""The facts that are kept, a file for each release: their order, and how they are written and read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

FACTS = Path(__file__).resolve().parents[1] / "facts"
FORMAT = 1
OLDEST = "0.6.0"

Json = dict[str, Any]


def version_key(release: str) -> tuple[tuple[int, ...], int]:
    """Order of stable releases: 0.9.0 < 0.9.0.1 < 0.10.0 < 0.10.0.post1. ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)*)(?:\.post(\d+))?", release)
    if match is None:
        raise ValueError(f"not a stable release: {release!r}")
    return tuple(int(part) for part in match[1].split(".")), int(match[2] or -1)


def stable(releases: list[str]) -> list[str]:
    """Those from OLDEST on, oldest first, without pre-releases."""
    kept = set()
    for release in releases:
        try:
            if version_key(release) >= version_key(OLDEST):
                kept.add(release)
        except ValueError:
            continue
    return sorted(kept, key=version_key)


def known() -> list[str]:
    """The releases whose facts are here, oldest first."""
    return stable([path.stem for path in FACTS.glob("*.json")])


def render(facts: Json) -> str:
    """JSON with sorted keys; a list or table that is short and holds no other stands on one line."""

    def lines(value: Any, indent: str) -> str:
        flat = json.dumps(value, sort_keys=True)
        if not isinstance(value, (dict, list)) or not value:
            return flat
        children = list(value.values()) if isinstance(value, dict) else value
        nested = any(isinstance(child, (dict, list)) and child for child in children)
        if not nested and len(indent) + len(flat) <= 100:
            return flat
        deeper = indent + " "
        if isinstance(value, dict):
            parts = [f"{json.dumps(key)}: {lines(value[key], deeper)}" for key in sorted(value)]
        else:
            parts = [lines(child, deeper) for child in value]
        opening, closing = "{}" if isinstance(value, dict) else "[]"
        inside = ",\n".join(deeper + part for part in parts)
        return f"{opening}\n{inside}\n{indent}{closing}"

    return lines(facts, "") + "\n"


def load_raw(release: str) -> Json:
    """The stored facts, as they are in the file."""
    raw: Json = json.loads((FACTS / f"{release}.json").read_text("utf-8"))
    return raw


def write(facts: Json) -> None:
    FACTS.mkdir(exist_ok=True)
    (FACTS / f"{facts['release']}.json").write_text(render(facts), "utf-8")
