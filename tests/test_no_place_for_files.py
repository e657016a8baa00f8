"""No directory for temporary files, as in a read-only container with a place for rings; names that no file can have."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

import kvhook
from kvhook.cli import main
from kvhook.ring import place
from tests.standin import fake_vllm, step_stats

RUN = str(Path(__file__).parent / "report/data/baseline.kvh")


@pytest.fixture
def no_temporary_directory(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Rings have a place; nothing else has."""

    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    monkeypatch.setenv("TMPDIR", str(fresh / "not there"))
    return fresh


@pytest.mark.parametrize("core", ["off", "steps"])
def test_a_run_is_recorded_where_there_is_a_place(no_temporary_directory: Path, core: str):
    trace = no_temporary_directory / "run.kvh"
    with fake_vllm() as vllm, kvhook.install(trace=trace, core=core):
        engine = vllm.engine()
        engine.plan += [step_stats()] * 3
        for _ in range(3):
            engine.step()
    assert len(kvhook.open(trace).steps()) == 3


def test_a_history_goes_into_shared_memory(no_temporary_directory: Path):
    assert place.history_root() == Path("/dev/shm")
    with fake_vllm() as vllm, kvhook.install(core="off") as session:
        engine = vllm.engine()
        engine.plan.append(step_stats())
        engine.step()
        assert len(session.steps()) == 1
        assert session.health().ok


def test_the_usual_places_are_those_that_there_are(no_temporary_directory: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    assert [found.parent for found in place.default_directories()] == [Path("/dev/shm")]


@pytest.mark.parametrize("verb", ["ls", "top --once", "clean --dry-run", "autopsy", f"doctor {RUN}"])
def test_what_reads_says_what_there_is(
    no_temporary_directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str
):
    monkeypatch.delenv("KVHOOK_DIR")
    # not the rings of the machine on which the tests run
    monkeypatch.setattr("kvhook.ring.directory.default_directories", lambda: place.default_directories()[:0])
    assert main(verb.split()) in (0, 1)
    said = capsys.readouterr()
    assert "No usable temporary directory" not in said.out + said.err
    assert "an error in kvhook" not in said.err


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
@pytest.mark.parametrize(
    "verb",
    [
        "ls --dir NAME", "top --once --dir NAME", "clean --dry-run --dir NAME", "tail --dir NAME", "autopsy --dir NAME",
        f"recover {RUN} --dir NAME", "recover NAME", "whatif NAME", f"whatif {RUN} --plot NAME",
        f"report {RUN} -o NAME",
        "summary NAME", "doctor NAME", "cache NAME", "compare NAME NAME", "export NAME out.csv",
    ],
)  # fmt: skip
def test_a_name_that_no_file_can_have_is_a_mistake_of_the_user(
    fresh: Path, capsys: pytest.CaptureFixture[str], verb: str, name: str
):
    try:
        code = main([name if word == "NAME" else word for word in verb.split()])
    except SystemExit as end:
        code = int(end.code or 0)
    assert code in (1, 2)
    said = capsys.readouterr().err
    assert "an error in kvhook" not in said
    assert "Traceback" not in said
