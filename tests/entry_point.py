"""kvhook's entry point for vLLM, where kvhook runs from a checkout that is not installed, as in the matrix.

vLLM finds a plug-in by the metadata of an installed package. Metadata in a folder on PYTHONPATH are as good.
"""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

from tests.conftest import ROOT


def make_known(folder: Path) -> Path:
    """Write metadata with the entry point into a folder, and give the folder for PYTHONPATH."""
    info = folder / "kvhook_entry_point-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kvhook-entry-point\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nkvhook = kvhook.plugin:load\n")
    return folder


def python_path(folder: Path) -> str:
    """PYTHONPATH with which engine cores find kvhook: this checkout, and the entry point if nothing has it yet."""
    known = any(point.name == "kvhook" for point in importlib.metadata.entry_points(group="vllm.general_plugins"))
    return os.pathsep.join(map(str, [ROOT] if known else [ROOT, make_known(folder)]))
