"""The recipes of docs/howto/frameworks.md, each as a program of its own in which the framework makes the engine.

``make frameworks`` runs them in an environment that has the frameworks (see environment.py). Elsewhere each is skipped.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.engine import vllm_here
from tests.engine.conftest import ENVIRONMENT
from tests.processes import output_of

#: Nothing is fetched, and nobody is told.
QUIET = {
    # some recipes leave compilation on, which is switched off here, as the engine tests have it
    "VLLM_USE_AOT_COMPILE": "0",
    "HF_DATASETS_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "DD_TRACE_ENABLED": "true",
    "DD_INSTRUMENTATION_TELEMETRY_ENABLED": "false",
    "DD_REMOTE_CONFIGURATION_ENABLED": "false",
    "OTEL_SDK_DISABLED": "false",
    "WANDB_MODE": "offline",
}
#: Put behind a program: what the framework returned, for the test.
TELL = """
import json as _json
with open({path!r}, "w") as _file:
    _json.dump({value}, _file)
"""

Run = Callable[..., Any]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    from kvhook.demo.model import make_tiny_model

    return str(make_tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture
def project(tmp_path: Path, tiny: str) -> Path:
    """The folder of a program. The tiny model lies in it under the name that the recipes use."""
    (tmp_path / "facebook").mkdir()
    (tmp_path / "facebook" / "opt-125m").symlink_to(tiny)
    return tmp_path


@pytest.fixture
def environment(project: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KVHOOK")}
    ours = {"VLLM_CPU_OMP_THREADS_BIND": vllm_here.no_binding(), "KVHOOK_DIR": str(project / "rings")}
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
    del kept["PATH"]
    return {**kept, **ENVIRONMENT, **QUIET, **ours, "PATH": path, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def run(project: Path, environment: dict[str, str]) -> Run:
    """Run a command in the project; gives what it printed."""

    def run(command: Sequence[str]) -> str:
        # kvhook's own command lies in the environment below this one
        ours = [sys.executable, "-m"] if command[0] == "kvhook" else []
        return output_of([*ours, *command], project, environment, timeout=900)

    return run


@pytest.fixture
def run_program(project: Path, run: Run) -> Run:
    """Run a program, and give the value of an expression in it once it is through."""

    def run_program(code: str, value: str) -> Any:
        program, told = project / "program.py", project / "told.json"
        program.write_text(code + TELL.format(path=str(told), value=value))
        run([sys.executable, str(program)])
        return json.loads(told.read_text())

    return run_program
