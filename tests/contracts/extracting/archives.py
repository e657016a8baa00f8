"""The few source files that are needed, out of a folder, a wheel or a source archive: path to text."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path
from typing import Any

from tests.contracts.extracting.wanted import WANTED_PATHS


class Unreadable(Exception):
    """This archive cannot be read this way; another may."""


def read_folder(folder: Path) -> dict[str, str]:
    """Path to text, from an installed or unpacked `vllm` folder (or the folder that holds it)."""
    root = folder.resolve().parent if (folder / "envs.py").is_file() else folder
    found = {path: (root / path).read_text("utf-8") for path in WANTED_PATHS if (root / path).is_file()}
    if "vllm/envs.py" not in found:
        raise Unreadable(f"no vllm package in {folder}")
    return found


def read_wheel(file: Any) -> dict[str, str]:
    """Path to text, from a wheel."""
    with zipfile.ZipFile(file) as archive:
        names = WANTED_PATHS.intersection(archive.namelist())
        infos = sorted((archive.getinfo(name) for name in names), key=lambda info: info.header_offset)
        return {info.filename: archive.read(info).decode("utf-8") for info in infos}


def read_sdist(file: Any) -> dict[str, str]:
    """Path to text, from a source archive; a stream is enough."""
    found: dict[str, str] = {}
    with tarfile.open(fileobj=file, mode="r|gz") as archive:
        for member in archive:
            path = member.name.partition("/")[2]
            if path in WANTED_PATHS and (content := archive.extractfile(member)) is not None:
                found[path] = content.read().decode("utf-8")
    return found
