"""Programs that tests run in a process of their own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.conftest import ROOT


class Ended(NamedTuple):
    """How a command ended, and all that it printed; `code` is None if its time was over."""

    code: int | None
    log: str


def ended(command: Sequence[str | Path], folder: Path, environment: Mapping[str, str], timeout: float) -> Ended:
    """Run a command in a folder, until it ends or its time is over.

    Processes that it leaves behind are killed. From 0.20 to 0.22 vLLM leaves the worker of a CPU engine; it would hold
    the output open for ever, and take a core for itself.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        begun = subprocess.Popen(
            command, cwd=folder, env=dict(environment), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        code = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = begun.wait(timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(begun.pid, signal.SIGKILL)
            begun.wait()
        log.seek(0)
        return Ended(code, log.read())


def output_of(command: Sequence[str | Path], folder: Path, environment: Mapping[str, str], timeout: float) -> str:
    """Run a command in a folder; all that it printed. It must end with 0 within so many seconds."""
    code, log = ended(command, folder, environment, timeout)
    assert code is not None, f"not ended after {timeout:.0f} s:\n{log[-8000:]}"
    assert code == 0, log[-8000:]
    return log


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
