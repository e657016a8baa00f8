"""Which packages an environment has, and which of the pinned ones are lacking or damaged.

Only the standard library and the syntax of Python 3.7, as in setup_env.py. Every run of that imports this, so what
only the first one needs is imported inside functions.
"""

from __future__ import annotations

import os

from lock_files import normal_name

#: The Python of the environments, for which the lock files were made.
ENGINE_PYTHON = (3, 11)
#: The build of torch without the GPU parts; not every index has it, see setup_install.py.
TORCH_CPU_SUFFIX = "+cpu"


def site_packages(venv: str) -> str:
    return os.path.join(venv, "lib", "python%d.%d" % ENGINE_PYTHON, "site-packages")


def installed(venv: str) -> dict[str, tuple[str, str]]:
    """Packages in the environment: normalised name -> (version, dist-info folder). One directory listing."""
    found = {}
    try:
        names = os.listdir(site_packages(venv))
    except OSError:
        return {}
    for entry in names:
        if entry.endswith(".dist-info"):
            name, _, version = entry[: -len(".dist-info")].partition("-")
            found[normal_name(name)] = (version, os.path.join(site_packages(venv), entry))
    return found


def fits(name: str, have: str, want: str) -> bool:
    """Whether an installed version satisfies a pin; torch may also be the CUDA build."""
    if name == "torch":
        return have in (want, want.replace(TORCH_CPU_SUFFIX, ""))
    return have == want


def lacking(venv: str, pins: dict[str, str]) -> list[str]:
    """The pinned packages that are not there, or there in another version."""
    have = installed(venv)
    return [name for name, want in pins.items() if not (name in have and fits(name, have[name][0], want))]


def damaged(dist_info: str) -> bool:
    """Whether files of an installed package are missing or cut short, as after an interrupted install."""
    import csv

    try:
        with open(os.path.join(dist_info, "RECORD"), encoding="utf-8", newline="") as f:
            rows = list(csv.reader(f))
    except OSError:
        return True
    base = os.path.dirname(dist_info)
    for row in rows:
        if not row or row[0].endswith(".pyc"):
            continue
        try:
            size = os.stat(os.path.join(base, row[0])).st_size
        except OSError:
            return True
        if len(row) > 2 and row[2] and int(row[2]) != size:
            return True
    return False


def remove_halves(venv: str, pins: dict[str, str]) -> list[str]:
    """Forget packages that an interrupted run left half there; returns the pinned ones yet to install."""
    import glob
    import shutil

    for leftover in glob.glob(os.path.join(site_packages(venv), "~*")):
        shutil.rmtree(leftover, ignore_errors=True)
    have = installed(venv)
    for name in pins:
        if name in have and damaged(have[name][1]):
            # Without its dist-info pip takes the package as absent, and overwrites what is there of it.
            shutil.rmtree(have[name][1])
    return lacking(venv, pins)
