"""Everything that is not done yet, from an empty `.venv` to one with vLLM, the tools and kvhook in it.

Only the standard library and the syntax of Python 3.7, as in setup_env.py.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time

from lock_files import read_pins
from setup_packages import TORCH_CPU_SUFFIX, lacking, remove_halves
from setup_pip import Pip, pip_failure
from setup_python import choose_python
from setup_stamp import DEV, HERE, LOCK, ROOT, read_stamp, write_stamp
from setup_venv import look_at_old, make_venv
from setup_words import SetupError, say

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

TORCH_CUDA = os.path.join(HERE, "lock", "torch-{}-cuda.txt")
DISK_CPU_GB, DISK_CUDA_GB = 4, 12


def set_up(venv: str, named: str, key: dict[str, Any], lock_fd: int) -> None:
    """Everything that is not done yet, from the first to the last step."""
    began = time.monotonic()
    prepare(venv, named, key)
    write_stamp(venv, {"complete": False, "key": key})
    install_all(Pip(venv, lock_fd), venv)
    check_engine(os.path.join(venv, "bin", "python"))
    write_stamp(venv, {"complete": True, "key": key})
    say("The environment in .venv is ready ({:.0f} s).".format(time.monotonic() - began))


def prepare(venv: str, named: str, key: dict[str, Any]) -> None:
    """Afterwards there is an environment to install into, an empty one or what an earlier run left."""
    state = look_at_old(venv)
    if state != "go on":
        python, facts = choose_python(venv, named)
        need_disk(DISK_CPU_GB)
        if state == "rebuild":
            shutil.rmtree(venv)
        make_venv(venv, python, facts, key)
    elif not read_stamp(venv).get("complete"):
        say("Completing the .venv that is there")


def install_all(pip: Pip, venv: str) -> None:
    """Install what is lacking of the engine and the tools, and kvhook itself in any case."""
    engine, tools = read_pins(LOCK), read_pins(DEV)
    todo = remove_halves(venv, dict(engine, **tools))
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


def check_engine(python: str) -> None:
    """Import vLLM once, so that a machine on which it cannot run says so here and not in the first test."""
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
