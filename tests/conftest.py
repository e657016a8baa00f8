"""What all tests share: nothing they record goes where the user's own recordings are."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def _private_ring_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVHOOK_DIR", str(tmp_path_factory.mktemp("rings")))
        yield


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nothing is installed, and what is recorded goes below this directory; afterwards nothing is installed."""
    import tempfile

    import kvhook

    rings, disk = tmp_path / "rings", tmp_path / "disk"
    disk.mkdir()
    monkeypatch.setenv("KVHOOK_DIR", str(rings))
    monkeypatch.setenv("TMPDIR", str(disk))
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    kvhook.uninstall()
    try:
        yield tmp_path
    finally:
        kvhook.uninstall()


Python = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def python(tmp_path: Path) -> Python:
    """Runs a script in a Python of its own, ``python(code, *arguments, **environment)``, which must end well.

    ``launcher``: a command that is to run the Python in its turn.
    """

    def run(
        code: str, *arguments: object, launcher: Sequence[str] = (), **environment: str
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*launcher, sys.executable, "-c", code, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "KVHOOK_DIR": str(tmp_path / "rings"), **environment},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run
