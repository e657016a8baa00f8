"""``kvhook top`` where there is nothing that was asked for, no room, or no terminal for a part of it."""

from __future__ import annotations

import asyncio
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from kvhook.cli import main
from tests.conftest import ROOT
from tests.ring.synthetic import Recording

#: No process has such a number: Linux gives none above 2 ** 22.
NOBODY = 1 << 23


def once(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["top", "--once", *arguments]) == 0
    return capsys.readouterr().out


def test_what_was_asked_for_and_what_there_is_instead_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("KVHOOK_DIR", str(tmp_path))
    monkeypatch.setattr("kvhook.ring.directory.default_directories", list)
    assert "No engine is being recorded on this machine yet." in once(capsys)
    Recording(tmp_path).run(3)
    here = os.getpid()
    out = once(capsys, str(NOBODY))
    assert f"No engine of process {NOBODY}, or of what it started, is being recorded." in out
    assert f"There is no process {NOBODY}." in out
    assert f"Other processes are being recorded: {here}\n" in out
    assert "on this machine yet" not in out
    idle = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        out = once(capsys, str(idle.pid), str(NOBODY))
    finally:
        idle.communicate(b"\n", timeout=60)
    assert f"No engine of processes {idle.pid}, {NOBODY}, or of what they started," in out
    assert f"There is no process {NOBODY}." in out
    assert "KV cache" in once(capsys, str(here))


def test_a_directory_without_rings_is_named_and_so_is_what_others_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("KVHOOK_DIR", str(tmp_path / "rings"))
    monkeypatch.setattr("kvhook.ring.directory.default_directories", list)
    none, empty = tmp_path / "none", tmp_path / "empty"
    empty.mkdir()
    out = once(capsys, "--dir", str(none))
    assert f"There is no directory {none}\n" in out
    assert "This screen shows the first one" in out
    Recording(tmp_path / "rings").run(3)
    out = once(capsys, "--dir", str(empty))
    assert f"There are no rings of engines that work in {empty}\n" in out
    assert f"Other processes are being recorded: {os.getpid()}\n" in out


@pytest.mark.parametrize("size", [(80, 1), (80, 2), (1, 1)])
@pytest.mark.parametrize("keys", [(), ("h",)])
def test_a_terminal_that_is_one_row_high_has_no_room_and_that_is_no_error(size: tuple[int, int], keys: tuple[str, ...]):
    app_module = pytest.importorskip("kvhook.top.app")

    async def drive() -> None:
        app = app_module.Top(lambda window: [], every=60.0)
        async with app.run_test(size=size) as driver:
            await app.workers.wait_for_complete()
            await driver.press(*keys)
            await driver.resize_terminal(80, 24)
            await driver.pause()
            assert app.shown[0].startswith("kvhook top")

    asyncio.run(drive())


@pytest.mark.parametrize(
    ("streams", "code", "said"),
    [
        ("2>errors", 0, "standard error, which is no terminal here"),
        ("2>&-", 0, "standard error, which is no terminal here"),
        ("</dev/null", 1, "standard input is no terminal; --once prints"),
        ("<&-", 1, "standard input is no terminal; --once prints"),
    ],
)
def test_where_a_part_of_the_screen_has_no_terminal_it_is_said_on_the_part_that_has(
    tmp_path: Path, streams: str, code: int, said: str
):
    Recording(tmp_path / "rings").run(3)
    ours, theirs = pty.openpty()
    try:
        top = subprocess.Popen(
            ["sh", "-c", f'exec "$@" {streams}', "sh", sys.executable, "-m", "kvhook", "top", "--dir", "rings"],
            env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color"},
            cwd=tmp_path,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        )
        try:
            assert top.wait(timeout=60) == code
        finally:
            top.kill()
            top.wait()
        text = os.read(ours, 65536).decode()
    finally:
        os.close(theirs)
        os.close(ours)
    assert said in text
    assert ("serve.py" in text) == (code == 0)
