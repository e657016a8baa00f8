"""Small JSON objects in files: what an environment was made from, and what came out of a run.

Only the standard library and the syntax of Python 3.7: setup_env.py needs it under whatever `python3` there is.
"""

from __future__ import annotations

import json
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON object, {} where there is none."""
    try:
        with open(path, encoding="utf-8") as f:
            found = json.load(f)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Write it in one go: it is there whole, or the old one still is."""
    new = os.fspath(path) + ".new"
    with open(new, "w", encoding="utf-8") as f:
        json.dump(content, f, indent=1)
        f.write("\n")
    os.replace(new, path)
