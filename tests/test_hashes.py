"""Nothing is installed whose hash is not in `engines/hashes.txt`: the set-up of `.venv`, the matrix, and pip itself."""

from __future__ import annotations

import hashlib
import importlib
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

ENGINES = ROOT / "tests/engines"
OTHER = "0" * 64


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script of that folder by its bare name, as the scripts import each other."""
    monkeypatch.syspath_prepend(str(ENGINES))
    return importlib.import_module


# The table


def pins_of(*paths: Path) -> set[str]:
    lines = (line.split("#")[0].strip() for path in paths for line in path.read_text(encoding="utf-8").splitlines())
    return {line for line in lines if line}


def test_everything_that_is_pinned_has_a_hash_and_nothing_else_has(scripts: Any):
    hashes = scripts("hashes")
    pinned = pins_of(*(ENGINES / "lock").glob("*.txt"), ENGINES / "dev.txt", ENGINES / "pip.txt")
    pinned |= pins_of(ROOT / "tests/frameworks/pins.txt")
    pinned |= {pin.removesuffix("+cpu") for pin in pinned if pin.startswith("torch==")}
    assert len(pinned) > 500
    table = hashes.read_table()
    assert set(table) == {hashes.normal(pin) for pin in pinned}
    assert {len(sha) for files in table.values() for sha in files.values()} == {64}


def test_each_file_of_the_table_is_of_the_package_that_it_stands_for(scripts: Any):
    hashes = scripts("hashes")
    for pin, files in hashes.read_table().items():
        for name in files:
            distribution, version = name.removesuffix(".tar.gz").removesuffix(".zip").split("-")[:2]
            assert hashes.normal(f"{distribution}=={version}") == pin, name


def test_a_pin_without_a_hash_is_named(scripts: Any):
    hashes = scripts("hashes")
    with pytest.raises(hashes.HashError, match=r"(?s)nobody==1\.0.*update_hashes\.py"):
        hashes.with_hashes(["wrapt==2.5.2", "nobody==1.0"])


@pytest.mark.parametrize("line", ["wrapt==2.5.2 abc wrapt.whl", "wrapt 2.5.2", f"wrapt {OTHER} x.whl", "a==1"])
def test_a_line_that_is_no_hash_is_refused(line: str, scripts: Any, tmp_path: Path):
    hashes = scripts("hashes")
    (tmp_path / "table.txt").write_text(f"# a comment\n\n{line}\n")
    with pytest.raises(hashes.HashError, match="no hash"):
        hashes.read_table(str(tmp_path / "table.txt"))


# With pip: a package of ours in a folder of ours, and an environment without anything in it


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """An environment with nothing in it but the pip of this one."""
    home = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    packages = home / "lib/python{}.{}/site-packages".format(*sys.version_info[:2])
    (packages / "pip").symlink_to(Path(sysconfig.get_path("purelib")) / "pip")
    (home / "bin/pip").write_text(f'#!/bin/sh\nexec "{home}/bin/python" -m pip "$@"\n')
    (home / "bin/pip").chmod(0o755)
    return home


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package, in the one place where pip looks."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    made = folder / "kvhook_trial-1.0-py3-none-any.whl"
    info = "kvhook_trial-1.0.dist-info"
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("kvhook_trial.py", "")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: kvhook-trial\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    # pip separates folders by spaces
    monkeypatch.setenv("PIP_FIND_LINKS", folder.as_uri())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return made


def name_hashes(module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *shas: str) -> None:
    """The table has these hashes for the package."""
    table = tmp_path / "table.txt"
    table.write_text("".join(f"kvhook-trial==1.0 {sha} file-{n}.whl\n" for n, sha in enumerate(shas)))
    # the default of a parameter is bound when the function is made
    monkeypatch.setattr(module.read_table, "__defaults__", (str(table),))


def installed(environment: Path) -> bool:
    return bool(list(environment.glob("lib/*/site-packages/kvhook_trial.py")))


@pytest.fixture
def pip(scripts: Any, environment: Path, tmp_path: Path) -> Any:
    """pip as setup_env.py calls it, and a descriptor that it hands on."""
    with (tmp_path / "guard").open("w") as guard:
        yield scripts("setup_pip").Pip(str(environment), guard.fileno())


def test_the_set_up_installs_a_file_with_the_right_hash_and_no_other(
    pip: Any, scripts: Any, environment: Path, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    hashes = scripts("hashes")
    right = hashlib.sha256(wheel.read_bytes()).hexdigest()
    name_hashes(hashes, monkeypatch, tmp_path, OTHER, "1" * 64)
    with pytest.raises(scripts("setup_words").SetupError) as caught:
        pip.install_checked("trial", {"kvhook-trial": "1.0"})
    said = str(caught.value)
    assert "kvhook-trial==1.0" in said
    assert f"expected sha256 {OTHER}" in said
    assert f"or {'1' * 64}" in said
    assert f"got      sha256 {right}" in said
    assert "do not install it" in said
    assert not installed(environment)

    name_hashes(hashes, monkeypatch, tmp_path, OTHER, right)
    worked, output = pip.install_checked("trial", {"kvhook-trial": "1.0"})
    assert worked, output
    assert installed(environment)


def test_one_bit_in_the_file_is_enough(
    pip: Any, scripts: Any, environment: Path, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    right = hashlib.sha256(wheel.read_bytes()).hexdigest()
    name_hashes(scripts("hashes"), monkeypatch, tmp_path, right)
    changed = bytearray(wheel.read_bytes())
    changed[40] ^= 1
    wheel.write_bytes(changed)
    with pytest.raises(scripts("setup_words").SetupError, match=f"(?s)expected sha256 {right}.*got"):
        pip.install_checked("trial", {"kvhook-trial": "1.0"})


def test_the_matrix_refuses_it_as_well(
    scripts: Any, environment: Path, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    environments, releases = scripts("matrix_environments"), scripts("matrix_releases")
    monkeypatch.setenv("KVHOOK_ENGINES", str(tmp_path / "engines"))
    name_hashes(scripts("hashes"), monkeypatch, tmp_path, OTHER)
    builder = environments.Builder(releases.RELEASES["0.27.1"])
    builder.home = environment
    told = f"(?s)is not the one.*kvhook-trial==1.0.*expected sha256 {OTHER}"
    with pytest.raises(environments.MatrixError, match=told):
        builder.pip(["kvhook-trial==1.0"])
    with pytest.raises(environments.MatrixError, match=told):
        builder.pip(["kvhook-trial==1.0"], "download", "-d", str(tmp_path / "kernels"))
    with pytest.raises(environments.MatrixError, match=r"(?s)No hash is known of kvhook-trial==2\.0.*update_hashes.py"):
        builder.pip(["kvhook-trial==2.0"])


def test_what_pip_cannot_find_is_no_wrong_hash(pip: Any, scripts: Any, wheel: Path, monkeypatch: pytest.MonkeyPatch):
    hashes = scripts("hashes")
    wheel.unlink()
    worked, output = pip.install_checked("wrapt", {"wrapt": "2.5.2"})
    assert not worked
    assert "No matching distribution found" in output
    assert hashes.mismatches(output) == []
