"""Arguments of a wrong type or value: each is a `KvhookError` that names the argument and says what was given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kvhook
from kvhook.recording.installation import current_session
from tests.standin import fake_vllm

#: One value of each type that somebody may give by mistake.
VALUES: tuple[Any, ...] = (
    None, True, 3, -1, 2.5, float("nan"), b"run.kvh", "", "run", "a\0b.kvh", "\ud800.kvh", ["run.kvh"], ("a",), {}, {1},
    object(), print, Path("."), int,
)  # fmt: skip
#: Argument of install -> the values above that it takes.
TAKES: dict[str, Callable[[Any], bool]] = {
    "trace": lambda v: v is None,
    "history": lambda v: v == 3 and v is not True,
    "ring_dir": lambda v: v is None or (isinstance(v, (str, Path)) and "\0" not in str(v) and "\ud800" not in str(v)),
    "ring_slots": lambda v: type(v) is int and v == 3,
    "level": lambda v: False,
    "max_overhead": lambda v: v is None,
    "core": lambda v: False,
    "labels": lambda v: v is None or callable(v) or (isinstance(v, str) and v != ""),
    "request_ids": lambda v: False,
    "anonymous": lambda v: v is True,
}


def refused(act: Callable[[], Any], name: str, value: Any) -> None:
    with pytest.raises(kvhook.KvhookError) as error:
        act()
    said = str(error.value)
    assert name in said
    assert repr(value) in said or type(value).__name__ in said or str(value) in said
    assert said.count("\n") == 0


@pytest.mark.parametrize("value", VALUES, ids=repr)
@pytest.mark.parametrize("name", TAKES)
def test_install_takes_a_value_or_names_the_argument(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: Any
):
    monkeypatch.chdir(fresh)
    if TAKES[name](value):
        kvhook.install(**{name: value})
    else:
        refused(lambda: kvhook.install(**{name: value}), name, value)
        assert current_session() is None
        kvhook.install()
        refused(lambda: kvhook.install(**{name: value}), name, value)


@pytest.mark.parametrize("value", [v for v in VALUES if v not in (3, 2.5) or v is True], ids=repr)
def test_on_step_names_a_wrong_pause_and_installs_nothing(fresh: Path, value: Any):
    refused(lambda: kvhook.on_step(print, every="1"), "every", "1")  # type: ignore[arg-type]
    refused(lambda: kvhook.on_step(print, every=value), "every", value)
    assert current_session() is None


@pytest.mark.parametrize("value", [v for v in VALUES if not callable(v)], ids=repr)
def test_on_step_and_attach_name_what_is_no_function_and_no_engine(fresh: Path, value: Any):
    refused(lambda: kvhook.on_step(value), "callback", value)
    with fake_vllm():
        refused(lambda: kvhook.attach(value), "attach() takes a vllm.LLM", value)
    assert current_session() is None


@pytest.mark.parametrize("value", [v for v in VALUES if v != Path(".")], ids=repr)
def test_open_names_what_is_no_file(fresh: Path, monkeypatch: pytest.MonkeyPatch, value: Any):
    monkeypatch.chdir(fresh)
    name = "run" if value == "run" else "path"
    refused(lambda: kvhook.open(value), name, value)
    refused(lambda: kvhook.open(value, "run.kvh"), name, value)


@pytest.mark.parametrize(
    ("trace", "says"),
    [
        (".kvh", "there is no name before .kvh"),
        ("x.kvh/", "this names a folder"),
        ("x.txt", "a trace ends in .kvh"),
        ("no/such/folder/x.kvh", "there is no directory no/such/folder"),
        (f"{'a' * 252}.kvh", "has 256 bytes; 207 are the most"),
        (f"{'a' * 210}.kvh", "has 214 bytes; 207 are the most"),
        (f"{'a' * 300}/x.kvh", "File name too long"),
    ],
)
def test_a_name_that_is_no_trace_s_is_told_apart(fresh: Path, monkeypatch: pytest.MonkeyPatch, trace: str, says: str):
    monkeypatch.chdir(fresh)
    with pytest.raises(kvhook.KvhookError) as error:
        kvhook.install(trace=trace)
    assert says in str(error.value)
    assert f"trace={trace!r}" in str(error.value)


def test_a_program_with_an_empty_name_has_a_shell_s_code(capfd: pytest.CaptureFixture[str]):
    from kvhook.cli import main

    assert main(["run", "--quiet", "--", ""]) == 127
    assert "'' cannot be run" in capfd.readouterr().err
