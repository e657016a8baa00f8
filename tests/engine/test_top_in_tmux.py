"""``kvhook top`` in a terminal of its own (tmux) while a real engine works: it shows what the engine did."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.engine import vllm_here
from tests.engine.top_engine import KEPT

pytest.importorskip("textual")
pytestmark = [
    pytest.mark.skipif(shutil.which("tmux") is None, reason="there is no tmux here"),
    pytest.mark.skipif(not vllm_here.since(0, 16), reason="tried with 0.32"),
]
#: Seconds in which something must stand on the screen.
PATIENCE = 60.0


class Terminal:
    """``kvhook top`` in tmux."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._tmux = ["tmux", "-S", str(folder / "tmux"), "-f", "/dev/null"]
        self._environment = environment | {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}
        # tmux does not always know with what a program has ended
        self.code = folder / "code"
        top = f"{sys.executable} -m kvhook top --dir {folder / 'rings'}"
        command = f"{top}; echo $? >{self.code}.new; mv {self.code}.new {self.code}"
        self("new-session", "-d", "-x", "80", "-y", "24", command, ";", "set", "-g", "remain-on-exit", "on")

    def __call__(self, *words: str) -> str:
        done = subprocess.run(
            [*self._tmux, *words], env=self._environment, cwd=ROOT, capture_output=True, text=True, check=True
        )
        return done.stdout

    def lines(self) -> list[str]:
        """What stands there."""
        return self("capture-pane", "-p").splitlines()

    def until(self, holds: Callable[[str], Any]) -> str:
        """The screen, as soon as it is as wanted."""
        give_up = time.monotonic() + PATIENCE
        while not holds(screen := "\n".join(self.lines())):
            assert time.monotonic() < give_up, screen
            time.sleep(0.05)
        return screen

    def shows(self, pattern: str) -> str:
        """The screen, as soon as there is something on it."""
        return self.until(lambda screen: re.search(pattern, screen))

    def resize(self, width: int, height: int) -> None:
        self("resize-window", "-x", str(width), "-y", str(height))


class Engine:
    """The engine's process."""

    def __init__(self, model: str, environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.engine.top_engine", model],
            env=environment,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self.answer()["pid"]

    def tell(self, what: str) -> None:
        assert self.process.stdin is not None
        print(what, file=self.process.stdin, flush=True)

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        raise AssertionError("the engine has ended")


@pytest.fixture
def environment(engine_environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    (tmp_path / "rings").mkdir(mode=0o700)
    return engine_environment | {
        "PYTHONPATH": f"{ROOT}:{engine_environment.get('PYTHONPATH', '')}",
        "KVHOOK_DIR": str(tmp_path / "rings"),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }


@pytest.fixture
def terminal(environment: dict[str, str], tmp_path: Path) -> Iterator[Terminal]:
    made = Terminal(tmp_path, environment)
    yield made
    made("kill-server")


def number(screen: str, pattern: str) -> float:
    """A number on the screen."""
    found = re.search(pattern, screen)
    assert found is not None, screen
    return float(found[1].replace(",", ""))


def test_the_screen_follows_an_engine_from_before_its_beginning_to_after_its_death(
    terminal: Terminal, environment: dict[str, str], model: str
):
    terminal.shows(r"There (are no rings of engines that work in|is no directory)")
    engine = Engine(model, environment)
    try:
        watch(terminal, engine)
    finally:
        if engine.process.poll() is None:
            engine.process.kill()
        engine.process.wait()


def watch(terminal: Terminal, engine: Engine) -> None:
    engine.tell("work")
    did = engine.answer()
    screen = terminal.shows(rf"{did['finished']} finished")
    screen = terminal.until(lambda screen: number(screen, r"steps +([\d,]+);") == did["steps"])
    assert f"{engine.pid}   0  alive" in screen
    cached = 100 * did["cached blocks"] / did["blocks"]
    assert cached > 1
    assert number(screen, r"used 0 %, cached (\d+) %, empty") == pytest.approx(cached, abs=0.51)
    assert f"of {did['blocks']} blocks" in screen
    assert "requests    0 running, 0 waiting, 0 preempted" in screen
    assert f"{did['finished']} finished, 0 aborted, 0 preempted" in screen
    assert did["hit rate"] > 0.2
    assert number(screen, r"hit rate .*, run ([\d.]+) %") == pytest.approx(100 * did["hit rate"], abs=0.06)
    assert "0 records missed here" in screen

    engine.tell("keep")
    screen = terminal.shows(rf"requests +{KEPT} running")
    assert number(screen, r"used (\d+) %") > 0
    for width, height in ((120, 40), (60, 15), (200, 50), (80, 24)):
        terminal.resize(width, height)
        screen = terminal.until(functools.partial(fits, width, height))
        assert str(engine.pid) in screen
        # the history is a chart with a scale where there is room for one
        assert bool(re.search(r"^history .*100 %$", screen, re.MULTILINE)) == (height >= 24)
    did = engine.answer()
    terminal.shows(rf"{did['finished']} finished, 0 aborted")
    terminal("send-keys", "p")
    terminal.shows("PAUSED")
    terminal("send-keys", "p")
    terminal.until(lambda screen: "PAUSED" not in screen)

    os.kill(engine.pid, signal.SIGKILL)
    screen = terminal.shows(f"its process has died: kvhook autopsy {engine.pid}")
    assert re.search(rf"{engine.pid} +0 +dead", screen)
    assert f"{did['finished']} finished, 0 aborted" in screen
    assert number(screen, r"steps +([\d,]+);") == did["steps"]
    terminal("send-keys", "q")
    terminal.until(lambda screen: terminal.code.exists())
    assert terminal.code.read_text() == "0\n"


def fits(width: int, height: int, screen: str) -> bool:
    """Whether it is drawn for a terminal of this size, to its end. tmux shows what was drawn before, cut off, until the
    program has drawn again."""
    lines = screen.splitlines()
    rule = next((line for line in lines if line.startswith("---")), "")
    whole = len(lines) == height and max(map(len, lines)) <= width and "q quit" in lines[-1]
    return whole and len(rule) == width and (width < 80 or "blocks" in screen)
