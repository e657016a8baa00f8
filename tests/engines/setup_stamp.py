"""Whether there is anything to do: what the stamp of a finished `.venv` has to say, and what it says.

This is all that a later run looks at. Only the standard library and the syntax of Python 3.7, as in setup_env.py.
"""

from __future__ import annotations

import hashlib
import os
import re

from json_files import read_json, write_json
from lock_files import read_pins
from setup_packages import installed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
LOCK = os.path.join(HERE, "lock", "0.32.0.txt")
DEV = os.path.join(HERE, "dev.txt")
# Raise this when the way of installing changes, so that older environments are gone through again.
RECIPE = 1
STAMP = ".kvhook-stamp"


def wanted_key(root: str = ROOT) -> dict[str, Any]:
    """What the stamp of a finished environment has to say; any difference means there is work to do."""
    # The editable install copies kvhook's metadata, so it grows stale with pyproject.toml and the version; and it
    # builds the extension beside its sources.
    step = os.path.join(root, "kvhook", "_step")
    sources = [os.path.join(step, name) for name in sorted(os.listdir(step)) if name.endswith((".c", ".h"))]
    build = [os.path.join(root, name) for name in ("pyproject.toml", "hatch_build.py")]
    return {
        "recipe": RECIPE,
        "packages": digest(LOCK, DEV),
        "kvhook": digest(*build, *sources) + version_line(root),
        "where": os.path.realpath(root),
    }


def digest(*paths: str) -> str:
    h = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as f:
            h.update(f.read())
    return h.hexdigest()


def version_line(root: str) -> str:
    """The line of kvhook's source that says its version."""
    try:
        with open(os.path.join(root, "kvhook", "__init__.py"), encoding="utf-8") as f:
            found = re.search(r"^__version__.*$", f.read(), re.MULTILINE)
    except OSError:
        return ""
    return found.group() if found else ""


def read_stamp(venv: str) -> dict[str, Any]:
    """The stamp of an environment made by this script, {} where there is none."""
    return read_json(os.path.join(venv, STAMP))


def write_stamp(venv: str, stamp: dict[str, Any]) -> None:
    write_json(os.path.join(venv, STAMP), stamp)


def is_ready(venv: str, key: dict[str, Any]) -> bool:
    """The quick look of every later run: finished, for these very files, at this very place, nothing gone."""
    if read_stamp(venv) != {"complete": True, "key": key}:
        return False
    scripts = ("python", "kvhook")
    if not all(os.path.exists(os.path.join(venv, "bin", name)) for name in scripts):
        return False
    have = installed(venv)
    # By name only: somebody who tries another release of a tool in here on purpose may do so.
    return all(name in have for path in (LOCK, DEV) for name in read_pins(path)) and "kvhook" in have
