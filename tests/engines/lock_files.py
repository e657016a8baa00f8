"""Reads the tables beside it: the lock files, with a `name==version` in each line, and others of the same look.

Only the standard library and the syntax of Python 3.7: setup_env.py needs it under whatever `python3` there is.
"""

from __future__ import annotations

import re

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from collections.abc import Iterator


def lines_of(path: str | os.PathLike[str]) -> Iterator[str]:
    """The lines of a table, without comments and empty ones."""
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            line = line.split("#")[0].strip()
            if line:
                yield line


def read_pins(path: str | os.PathLike[str]) -> dict[str, str]:
    """The pins of a lock file, as normalised name -> version."""
    pins = {}
    for line in lines_of(path):
        name, version = line.split("==")
        pins[normal_name(name)] = version.strip()
    return pins


def normal_name(name: str) -> str:
    """A package name as packaging tools compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()
