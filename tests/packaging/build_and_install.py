"""Builds the sdist and the wheel, checks them, and uses them where nothing else is installed: `make package`.

1. `python -m build` makes the sdist, and the wheel from that sdist; both go to `dist/`.
2. `twine check --strict` reads their metadata and renders the README as the package index does.
3. The wheel holds the package's files, the extension and no others; the sdist holds what a packager needs, the C
   sources among it.
4. A new environment gets the wheel with pip, then the sdist with a C compiler and without one; in it `kvhook` runs,
   without vLLM, on the step path in C or the one in Python.

The environment lies in a temporary folder. wrapt and numpy, and what builds the sdist, are fetched at the versions that
the tests use, and checked against their hashes; pip then finds nothing but these.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/engines"))

import hashes  # noqa: E402

DIST = ROOT / "dist"
PINS = (ROOT / "tests/engines/lock/0.32.0.txt", ROOT / "tests/engines/dev.txt")
#: What kvhook needs, and what builds it; the versions are those of PINS.
FETCHED = (
    *("numpy", "wrapt"),
    *("hatchling", "packaging", "pathspec", "pluggy", "setuptools", "tomlkit", "trove-classifiers"),
)
#: What a packager, or somebody who wants to run the tests, looks for in the sdist.
IN_THE_SDIST = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "SECURITY.md",
    "docs/conf.py",
    "examples/quick_start.py",
    "hatch_build.py",
    "pyproject.toml",
    "tests/conftest.py",
)
#: Run in the new environment. The command line must work; without vLLM `doctor` says so and gives exit code 1.
USE = """
import sys
import kvhook
from kvhook import _step

assert (_step.native is None) == (sys.argv[1] == "python"), _step.why_not
assert not {"numpy", "vllm"} & set(sys.modules), "import kvhook must stay light"
session = kvhook.install()
assert len(session.steps()) == 0
assert "no steps" in str(session.summary())
session.dump("empty.jsonl", overwrite=True)
kvhook.uninstall()
"""


def main() -> int:
    """Everything, in order; an exception ends it."""
    wheel, sdist = build()
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)
    compare_with_checkout(wheel, sdist)
    with tempfile.TemporaryDirectory(prefix="kvhook-package-") as folder:
        python, fetched = make_environment(Path(folder)), Path(folder) / "fetched"
        fetch(python, fetched)
        install(python, fetched, wheel)
        use(python, Path(folder), "c")
        again = ("--force-reinstall", "--no-deps")
        install(python, fetched, *again, sdist)
        use(python, Path(folder), "c")
        install(python, fetched, *again, "--no-cache-dir", sdist, CC="/bin/false", CXX="/bin/false")
        use(python, Path(folder), "python")
    print(f"\nThe packages are whole and work: {wheel.relative_to(ROOT)}, {sdist.relative_to(ROOT)}")
    return 0


def build() -> tuple[Path, Path]:
    """Wheel and sdist of this checkout; those of earlier builds are removed."""
    for old in [*DIST.glob("kvhook-*.whl"), *DIST.glob("kvhook-*.tar.gz")]:
        old.unlink()
    # hatchling and setuptools are here at their pinned versions: an environment for the build alone would fetch others
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", DIST, ROOT)
    (wheel,) = DIST.glob("kvhook-*.whl")
    (sdist,) = DIST.glob("kvhook-*.tar.gz")
    return wheel, sdist


def compare_with_checkout(wheel: Path, sdist: Path) -> None:
    """The packages hold what the checkout holds."""
    here = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "kvhook").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so"
    }
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    extensions = {name for name in packed if name.startswith("kvhook/_step/native.") and name.endswith(".so")}
    if len(extensions) != 1:
        raise SystemExit(f"the wheel holds {len(extensions)} extensions, not one")
    expect("the wheel", packed - extensions, {name for name in here if not name.endswith((".c", ".h"))})
    with tarfile.open(sdist) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    lacking = sorted({*IN_THE_SDIST, *here} - found)
    if lacking:
        raise SystemExit(f"the sdist lacks {', '.join(lacking)}")


def expect(what: str, found: set[str], wanted: set[str]) -> None:
    """End with a message if two sets of files differ."""
    if found != wanted:
        raise SystemExit(f"{what} lacks {sorted(wanted - found)} and has {sorted(found - wanted)} too many")


def make_environment(folder: Path) -> Path:
    """The Python of an empty environment."""
    run(sys.executable, "-m", "venv", folder / "venv")
    return folder / "venv" / "bin" / "python"


def fetch(python: Path, folder: Path) -> None:
    """What kvhook needs goes into a folder, each file checked against its hash."""
    lines = [line for path in PINS for line in path.read_text(encoding="utf-8").splitlines()]
    pins = [line for line in lines if line.partition("==")[0] in FETCHED]
    listed = python.parents[1] / "requirements.txt"
    listed.write_text("\n".join(hashes.with_hashes(pins)) + "\n", encoding="utf-8")
    options = ("--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:", "--require-hashes")
    run(python, "-m", "pip", "download", *options, "--dest", folder, "--requirement", listed)


def install(python: Path, fetched: Path, *what: str | Path, **environment: str) -> None:
    """pip install, which finds nothing but what was fetched, also where it builds."""
    options = ("--quiet", "--disable-pip-version-check", "--no-index", "--find-links", fetched)
    run(python, "-m", "pip", "install", *options, *what, more=environment)


def use(python: Path, folder: Path, step_path: str) -> None:
    """What was installed works, away from the checkout."""
    run(python, "-c", USE, step_path, cwd=folder)
    kvhook = python.with_name("kvhook")
    run(kvhook, "--version", cwd=folder)
    run(kvhook, "ls", cwd=folder)
    said = run(kvhook, "doctor", cwd=folder, code=1)
    if "vLLM not found" not in said:
        raise SystemExit(f"kvhook doctor was to say that there is no vLLM, and said:\n{said}")


def run(*command: str | Path, cwd: Path = ROOT, code: int = 0, more: Mapping[str, str] = MappingProxyType({})) -> str:
    """Run a command, which must give this exit code; what it printed."""
    shown = " ".join("'...'" if part == USE else str(part) for part in command)
    print(f"$ {shown}", flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | dict(more)
    if cwd != ROOT:
        environment["KVHOOK_DIR"] = str(cwd / "rings")
    done = subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode != code:
        raise SystemExit(f"{done.stdout}\n{shown}: exit code {done.returncode}, not {code}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
