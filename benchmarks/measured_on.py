"""The machine that a benchmark's figures were measured on."""

from __future__ import annotations

import contextlib
import platform
from pathlib import Path
from typing import Any

import wrapt

from kvhook import _step
from kvhook.adapters.table import vllm_version


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": model or platform.processor(),
        "python": platform.python_version(),
        "step_path": "the extension" if _step.native is not None else f"Python ({_step.why_not})",
        "wrapt": wrapt.__version__,
        "wrapt_c_extension": wrapt.FunctionWrapper.__module__ != "wrapt.wrappers",
        "vllm": vllm_version() or None,
        "system": platform.platform(terse=True),
    }
