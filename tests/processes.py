"""Programs that tests run in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.conftest import ROOT


def output_of(command: Sequence[str | Path], folder: Path, environment: Mapping[str, str], timeout: float) -> str:
    """Run a command in a folder; all that it printed. It must end with 0 within so many seconds."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    return done.stdout


def results_of(
    script: Path, *arguments: str, folder: Path, environment: Mapping[str, str], timeout: float
) -> dict[str, Any]:
    """Run a script that writes results.json into a folder; what is in there, and under "log" what it printed.

    The name of the file is the script's last argument. Its rings lie in the folder, and the checkout is its kvhook.
    """
    path = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    more = {"PYTHONPATH": ":".join(path), "KVHOOK_DIR": str(folder / "rings")}
    results = folder / "results.json"
    command: list[str | Path] = [sys.executable, script, *arguments, results]
    log = output_of(command, folder, {**environment, **more}, timeout)
    found: dict[str, Any] = json.loads(results.read_text())
    return found | {"log": log}
