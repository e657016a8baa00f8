"""Writes `hashes.txt`: the sha256 of every file that may be installed for a pin. For whoever changes a pin.

    .venv/bin/python tests/engines/update_hashes.py            add what is missing, drop what is pinned no more
    .venv/bin/python tests/engines/update_hashes.py --check    change nothing; 1 if something is missing or too much

It asks the index that pip is configured for, through pip itself, about pinned packages without a hash. Wheels count
that CPython 3.11 can use on Linux x86-64; an sdist counts only where there is no such wheel. A hash that is in the
table is never replaced: what an index says later cannot change what was pinned.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# The neighbours of a script are found by their bare names.
from hashes import TABLE, normal, read_table
from lock_files import lines_of

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PINNED = (
    *sorted((HERE / "lock").glob("*.txt")),
    HERE / "dev.txt",
    HERE / "pip.txt",
    ROOT / "tests/frameworks/pins.txt",
)
#: glibc 2.5 is what the oldest wheels are made for.
NEWEST_GLIBC = 45
HEADER = """\
# The sha256 of every file that may be installed: name==version, hash, file. For CPython 3.11 on Linux x86-64.
# update_hashes.py writes this.
"""


def pinned() -> list[str]:
    """Every `name==version` of the lock files, and of those with a CPU build of torch also the plain one."""
    found = set()
    for path in PINNED:
        found |= {normal(line) for line in lines_of(path)}
    # where no CPU build is on offer, the plain one is taken
    found |= {pin.removesuffix("+cpu") for pin in found if pin.startswith("torch==")}
    return sorted(found)


def platforms() -> list[str]:
    """What wheels for Linux x86-64 with glibc may be called."""
    old = ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]
    return [f"manylinux_2_{minor}_x86_64" for minor in range(NEWEST_GLIBC, 4, -1)] + old


class Index:
    """What the configured index has, as pip sees it."""

    def __init__(self) -> None:
        from pip._internal.commands import create_command
        from pip._internal.models.target_python import TargetPython

        command: Any = create_command("index")
        options, _ = command.parse_args(["versions", "any"])
        # 3.11 stands for 3.11.0: what asks for a later one is not for everybody who has a Python 3.11
        target = TargetPython(platforms=platforms(), py_version_info=(3, 11), implementation="cp")
        session = command._build_session(options)
        self.finder = command._build_package_finder(options=options, session=session, target_python=target)

    def files(self, pin: str) -> dict[str, str]:
        """File name -> sha256 of what pip could take for a pin."""
        from pip._vendor.packaging.version import Version

        name, version = pin.split("==")
        # As texts: pip has an old kind of version for what was named before there were rules. 2.13.0 is not 2.13.0+cpu.
        candidates = [c for c in self.finder.find_all_candidates(name) if str(c.version) == str(Version(version))]
        wheels = [c for c in candidates if c.link.is_wheel]
        found: dict[str, str] = {}
        for link in (c.link for c in wheels or candidates):
            if found.setdefault(link.filename, sha256(link)) != sha256(link):
                raise SystemExit(f"There are two different files that are called {link.filename}.")
        return found


def sha256(link: Any) -> str:
    """What the index says; of a file on this disk, what it is."""
    if link.is_file and not link.hash:
        return hashlib.sha256(Path(link.file_path).read_bytes()).hexdigest()
    if link.hash_name != "sha256" or not re.fullmatch("[0-9a-f]{64}", link.hash or ""):
        raise SystemExit(f"The index gives no sha256 for {link.filename}.")
    return str(link.hash)


def written(table: dict[str, dict[str, str]]) -> str:
    lines = [f"{pin} {sha} {name}\n" for pin in sorted(table) for name, sha in sorted(table[pin].items())]
    return HEADER + "".join(lines)


def main(arguments: Iterable[str]) -> int:
    """1 if a pin has no hash."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args(list(arguments)).check
    table = read_table() if Path(TABLE).exists() else {}
    wanted = pinned()
    missing = [pin for pin in wanted if pin not in table]
    too_much = sorted(set(table) - set(wanted))
    if check:
        for pin in missing:
            print(f"no hash: {pin}")
        for pin in too_much:
            print(f"pinned no more: {pin}")
        return 1 if missing or too_much else 0
    index = Index()
    try:
        for number, pin in enumerate(missing, 1):
            files = index.files(pin)
            if files:
                table[pin] = files
            print(f"{number} of {len(missing)}: {pin}, {len(files) or 'NO'} files", flush=True)
    finally:
        Path(TABLE).write_text(written({pin: table[pin] for pin in wanted if pin in table}), encoding="utf-8")
    lacking = [pin for pin in wanted if pin not in table]
    if lacking:
        print(f"No file is known of {', '.join(lacking)}.")
    return 1 if lacking else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
