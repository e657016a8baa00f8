"""Names of files are somebody's: none of them can send an escape sequence to the terminal."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import kvhook
from kvhook.cli import main
from kvhook.cli.people import for_people
from kvhook.errors import KvhookError, RingDirectoryError
from tests.hostile import DATA
from tests.test_safe_files import READING

ODD = "a\x1b[2J\x07\r\x9b31m\N{RIGHT-TO-LEFT OVERRIDE}b"


def checked(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed, which has nothing in it that moves a cursor."""
    out, err = capsys.readouterr()
    assert [c for c in out + err if not c.isprintable() and c != "\n"] == []
    return out + err


def call(verb: str, file: Path) -> int:
    words = {"FILE": str(file), "SOUND": str(DATA / "baseline.kvh"), "OUT": str(file.parent / "out")}
    return main([next((word.replace(k, v) for k, v in words.items() if k in word), word) for word in READING[verb]])


@pytest.mark.parametrize("ending", [".kvh", ".jsonl", ".csv", ""])
@pytest.mark.parametrize("place", ["file", "folder", "not there"])
@pytest.mark.parametrize("verb", READING)
def test_an_error_says_the_name_of_a_file_without_its_escape_sequences(
    tmp_path: Path, verb: str, place: str, ending: str, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "folder"
    folder.mkdir()
    file = folder / f"{ODD}{ending}"
    if place != "not there":
        file.touch()
    call(verb, folder if place == "folder" else file)
    assert checked(capsys)


@pytest.mark.parametrize("verb", READING)
def test_a_page_says_it_so_too(tmp_path: Path, verb: str, capsys: pytest.CaptureFixture[str]):
    if verb == "plot":
        pytest.importorskip("matplotlib")
    for part in DATA.glob("baseline.*"):
        shutil.copy(part, tmp_path / part.name.replace("baseline", ODD))
    assert call(verb, tmp_path / f"{ODD}.kvh") == 0
    checked(capsys)


def test_json_has_the_name_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name in (f"{ODD}.kvh", "b.kvh"):
        shutil.copy(DATA / "baseline.kvh", tmp_path / name)
    assert main(["summary", str(tmp_path / f"{ODD}.kvh"), str(tmp_path / "b.kvh"), "--json"]) == 0
    assert str(tmp_path / f"{ODD}.kvh") in json.loads(checked(capsys))


def test_an_error_in_python_says_it_so_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert str(KvhookError(f"cannot open {ODD}\nat all")) == "cannot open a?[2J???31m?b\nat all"
    (tmp_path / ODD).touch()
    with pytest.raises(RingDirectoryError) as caught:
        kvhook.install(ring_dir=tmp_path / ODD)
    assert "a?[2J" in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_lines_and_what_is_no_text_stay_as_they_are(monkeypatch: pytest.MonkeyPatch):
    written = io.BytesIO()
    out: Any = io.TextIOWrapper(written, encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", None)
    with for_people(to_the_end=False):
        assert sys.stderr is None
        assert type(sys.stdout) is not type(out)
        print("one\n\ttwo ▁▂▃ é", ODD)
        sys.stdout.writelines(["x\n", "\x1b[0m"])
        sys.stdout.flush()
        assert sys.stdout.encoding == "utf-8"
    assert sys.stdout is out
    assert written.getvalue().decode() == "one\n\ttwo ▁▂▃ é a?[2J???31m?b\nx\n?[0m"
