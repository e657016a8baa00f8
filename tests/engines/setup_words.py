"""How the set-up speaks to whoever types `make`: a line, the error that ends it, and how far it is.

Only the standard library and the syntax of Python 3.7, as in setup_env.py.
"""

from __future__ import annotations

import sys
import time

#: What `.venv` can be made with.
NEEDED = "CPython 3.11 on Linux x86-64 with glibc 2.28 or newer"
OWN_VLLM_ADVICE = """\
To use kvhook with a vLLM that you already have, type in its environment:
    pip install -e '.[demo]'
    kvhook demo"""


class SetupError(Exception):
    """Something the user has to know; the text is shown as it is, without a traceback."""


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
