"""The hashes of everything that is installed: `hashes.txt`, one file of a package in each line.

Only the standard library and the syntax of Python 3.7: setup_env.py reads it under whatever `python3` there is.
update_hashes.py writes the table.
"""

from __future__ import annotations

import os
import re

from lock_files import lines_of, normal_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

TABLE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "hashes.txt")


class HashError(ValueError):
    """A package without a hash, or a line of the table that is none; the text is for people."""


def normal(pin: str) -> str:
    """A pin with its name as packaging tools compare it."""
    name, _, version = pin.partition("==")
    return "{}=={}".format(normal_name(name), version)


def read_table(path: str = TABLE) -> dict[str, dict[str, str]]:
    """`name==version`, the name normalised -> file name -> sha256.

    A line is `name==version sha256 file`. The order does not count.
    """
    table: dict[str, dict[str, str]] = {}
    for line in lines_of(path):
        parts = line.split()
        if len(parts) != 3 or "==" not in parts[0] or not re.match(r"[0-9a-f]{64}$", parts[1]):
            raise HashError("{} has a line that is no hash: {}".format(os.path.basename(path), line[:120]))
        table.setdefault(normal(parts[0]), {})[parts[2]] = parts[1]
    return table


def with_hashes(pins: Iterable[str], table: dict[str, dict[str, str]] | None = None) -> list[str]:
    """Requirement lines of pip's, each pin with the hashes of its files; a HashError names pins that have none."""
    table = read_table() if table is None else table
    pins = [normal(pin) for pin in pins]
    lacking = [pin for pin in pins if pin not in table]
    if lacking:
        raise HashError(
            "No hash is known of {}.\n"
            "tests/engines/hashes.txt has one for each pinned package. After a change of a pin,\n"
            "`.venv/bin/python tests/engines/update_hashes.py` adds what is missing.".format(", ".join(lacking))
        )
    return [" ".join([pin, *("--hash=sha256:" + sha for sha in sorted(set(table[pin].values())))]) for pin in pins]


def mismatches(output: str) -> list[str]:
    """What pip says about files that are not the ones of the table, in words for people; [] if it says nothing."""
    lines = output.splitlines()
    told = []
    for number, line in enumerate(lines):
        found = re.match(r"\s+Got\s+([0-9a-f]{64})\s*$", line)
        if not found:
            continue
        expected: list[str] = []
        at = number - 1
        while at >= 0:
            known = re.match(r"\s+Expected\s+(?:sha256|or)\s+([0-9a-f]{64})", lines[at])
            if not known:
                break
            expected.insert(0, known.group(1))
            at -= 1
        # The package and its hashes are named before; its place on the index or the disk is left to pip's own words.
        what = re.sub(r" --hash=\S+", "", lines[at].strip().rstrip(":")) if at >= 0 else "a package"
        what = re.split(r" (?:from|\() ?", what)[0].rstrip()
        told.append(
            "{}\n    expected sha256 {}\n    got      sha256 {}".format(
                what, "\n                 or ".join(expected), found.group(1)
            )
        )
    return told


def mismatch_message(told: list[str]) -> str:
    """What to say where a file is not the one that was pinned."""
    return "\n".join(
        [
            "Stopped: a file is not the one that tests/engines/hashes.txt names. It was not installed.",
            *("  " + each for each in told),
            "What to do: the copy of a proxy, of a mirror or in pip's cache may be damaged. Run `pip cache purge`",
            "and try again, without PIP_INDEX_URL, PIP_EXTRA_INDEX_URL and PIP_FIND_LINKS if they are set. If the",
            "same hash comes again, somebody has changed the file: do not install it.",
        ]
    )
