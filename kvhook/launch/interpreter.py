"""Which Python a command runs in, and whether vLLM finds kvhook there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from kvhook.ring.place import open_regular

_LOOK = (
    "import importlib.metadata as m, sys\n"
    "names = {e.name for e in m.entry_points(group='vllm.general_plugins')}\n"
    "sys.exit(0 if 'kvhook' in names else 9)"
)


def command_of(words: Sequence[str]) -> list[str]:
    """The command to run: a Python script that is no program by itself runs in this Python."""
    first = Path(words[0])
    if first.suffix == ".py" and first.is_file() and not os.access(first, os.X_OK):
        return [sys.executable, *words]
    return list(words)


def interpreter_of(command: Sequence[str]) -> str:
    """The Python that a command runs in: itself, or that in the first line of a script such as ``vllm``; "" if it
    cannot be told."""
    program = shutil.which(command[0]) or ""
    if re.fullmatch(r"python[\d.]*", Path(command[0]).name):
        return program
    try:
        with open(open_regular(program), "rb") as file:
            first = file.readline(500).decode(errors="replace")
    except OSError:
        return ""
    words = first.removeprefix("#!").split() if first.startswith("#!") else []
    if words and Path(words[0]).name == "env":
        words = [shutil.which(words[1]) or ""] if len(words) > 1 else []
    return words[0] if words and "python" in Path(words[0]).name else ""


def lacks_kvhook(interpreter: str) -> bool:
    """Whether vLLM would not find kvhook's plug-in in that Python."""
    try:
        done = subprocess.run([interpreter, "-c", _LOOK], capture_output=True, timeout=30, check=False)
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 9
