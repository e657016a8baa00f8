"""Make `.venv` with the real vLLM (CPU build), the development tools and kvhook itself.

`make demo`, `make test` and the others call this first. Everything is pinned: `lock/0.32.0.txt` is the
engine, `dev.txt` the tools, and `hashes.txt` has the hash of each file; another file is not installed.
Only the standard library is used, and only syntax that Python 3.7 can read, because it runs under whatever
`python3` the machine has. The environment itself is made with a Python 3.11, the version for which the lock
was made and tested (for 3.10 some of its packages have no wheel, and with 3.12 and later vLLM asks for more
packages than it lists).

The second run compares one stamp file and installs nothing. A run that was cut short is taken up again:
what is whole stays, what is half there is installed anew.

This file is the command line; the modules beside it whose names begin with `setup_` do the work.
"""

from __future__ import annotations

import os
import sys

# Under -I the folder of a script is not where Python looks for modules.
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

# What does the work is imported where it is needed: the second run should cost nothing but a look.
from setup_stamp import ROOT, is_ready, wanted_key
from setup_words import SetupError, say

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


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

    from setup_python import choose_python

    path = shutil.which(os.path.expanduser(named)) or ""
    if path and os.path.realpath(os.path.dirname(path)) == os.path.realpath(os.path.join(venv, "bin")):
        return
    choose_python(venv, named)


def locked_set_up(venv: str, named: str, key: dict[str, Any]) -> int:
    """Set up while no other run does; a second one waits and then finds the work done."""
    import signal

    if not sys.platform.startswith("linux"):
        # Without a look at any Python: none will do, and the lock below is for POSIX systems.
        from setup_python import no_python_message

        raise SetupError(no_python_message(["  this system: " + sys.platform], ["x on y"]))
    import fcntl

    from setup_install import set_up

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
