"""`.venv` itself: what to do about one that is there already, and how an empty one is made.

Only the standard library and the syntax of Python 3.7, as in setup_env.py.
"""

from __future__ import annotations

import os
import re
import subprocess

from lock_files import read_pins
from setup_packages import ENGINE_PYTHON, installed
from setup_pip import clean_environment, write_wishes
from setup_stamp import HERE, read_stamp, write_stamp
from setup_words import NEEDED, OWN_VLLM_ADVICE, SetupError, say

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PIP = os.path.join(HERE, "pip.txt")


def make_venv(venv: str, python: str, facts: dict[str, Any], key: dict[str, Any]) -> None:
    """An empty environment, marked as ours from its first moment."""
    say("Making .venv with Python {} ({})".format(facts["version"], python))
    os.makedirs(venv)
    write_stamp(venv, {"complete": False, "key": key})
    without = [] if facts["ensurepip"] else ["--without-pip"]
    steps = [[python, "-m", "venv", *without, venv]]
    if without:
        # Debian's python3 without python3-venv: the pip that is there puts one into the environment.
        inside, wishes = os.path.join(venv, "bin", "python"), os.path.join(venv, ".kvhook-wanted.txt")
        write_wishes(wishes, read_pins(PIP))
        checked = ["--no-deps", "--only-binary=:all:", "--require-hashes", "-r", wishes]
        steps.append([python, "-m", "pip", "--python", inside, "install", "--quiet", *checked])
    for step in steps:
        done = subprocess.run(
            step,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=clean_environment(),
        )
        if done.returncode:
            tail = done.stdout.decode("utf-8", "replace").strip().splitlines()[-8:]
            raise SetupError("{} failed:\n    {}".format(" ".join(step), "\n    ".join(tail)))


def look_at_old(venv: str) -> str:
    """What to do about .venv: "new", "go on" or "rebuild"; a SetupError if it is somebody else's.

    Only what this script made is ever removed, and nothing is installed among packages that somebody else chose.
    """
    if not os.path.lexists(venv):
        return "new"
    ours = bool(read_stamp(venv))
    if not ours and not os.path.isfile(os.path.join(venv, "pyvenv.cfg")):
        raise SetupError(
            ".venv is there but is no Python environment, so it was left alone.\n"
            "Move it away and run the same make command again."
        )
    right_python, has_pip = runs(venv)
    if ours:
        if not (right_python and has_pip):
            say("The .venv that is there does not run any more; making it anew.")
            return "rebuild"
        if moved(venv):
            say("The .venv that is there was made at another place; making it anew.")
            return "rebuild"
        return "go on"
    others = sorted(set(installed(venv)) - {"pip", "setuptools", "wheel"})
    if right_python and has_pip and not others and not moved(venv):
        return "go on"
    raise SetupError(
        "There is a .venv already, {}. This script did not make it, so it was left alone.\n"
        "vLLM's CPU build needs an environment of its own, with {}.\n"
        "Move that .venv away, or remove it with `make clean-env`; then run the same make command again.\n\n{}".format(
            described(venv, right_python, has_pip, others), NEEDED, OWN_VLLM_ADVICE
        )
    )


def described(venv: str, right_python: bool, has_pip: bool, others: list[str]) -> str:
    """What kind of environment somebody else's .venv is; `others` are the packages in it."""
    if right_python and others:
        return "with packages of its own ({}{})".format(", ".join(others[:3]), ", ..." if others[3:] else "")
    if right_python:
        return "moved here from another place" if has_pip else "without pip"
    version = venv_version(venv)
    if version[:2] in ((), ENGINE_PYTHON):
        return "which does not run"
    return "for Python " + ".".join(map(str, version))


def runs(venv: str) -> tuple[bool, bool]:
    """Whether the environment's Python runs and is of the right version, and whether it has pip."""
    snippet = "import importlib.util as u, sys; print(sys.version_info[:2] == {!r}, u.find_spec('pip') is not None)"
    command = [os.path.join(venv, "bin", "python"), "-Ic", snippet.format(ENGINE_PYTHON)]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return False, False
    answer = done.stdout.decode().split() if done.returncode == 0 else []
    return answer[:1] == ["True"], answer[1:] == ["True"]


def venv_version(venv: str) -> tuple[int, ...]:
    """Which Python an environment is for, from its pyvenv.cfg; () if that cannot be read."""
    try:
        with open(os.path.join(venv, "pyvenv.cfg"), encoding="utf-8") as f:
            found = re.search(r"^version(?:_info)?\s*=\s*([\d.]+)", f.read(), re.MULTILINE)
    except OSError:
        return ()
    return tuple(int(part) for part in found.group(1).strip(".").split(".")) if found else ()


def moved(venv: str) -> bool:
    """Whether the scripts in bin/ point to another place than where they are."""
    where = read_stamp(venv).get("key", {}).get("where")
    if where and os.path.realpath(where) != os.path.realpath(os.path.dirname(venv)):
        return True
    try:
        with open(os.path.join(venv, "bin", "pip"), "rb") as f:
            first = f.readline().decode("utf-8", "replace").strip()
    except OSError:
        return False
    folder = os.path.dirname(first[2:].strip()) if first.startswith("#!/") else ""
    # A path too long for a "#!" line has /bin/sh there instead.
    if not folder or not os.path.basename(first).startswith("python"):
        return False
    return os.path.realpath(folder) != os.path.realpath(os.path.join(venv, "bin"))
