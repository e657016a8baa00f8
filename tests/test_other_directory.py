"""A program that goes to another directory between `kvhook.install` and its engine, as Hydra does: all files of the run
lie where the path said when it was given."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import kvhook
from kvhook.core.plan import read_plan
from kvhook.recording.from_environment import make_absolute
from tests.conftest import ROOT
from tests.standin import FakeVllm, fake_vllm, play, step_stats


@pytest.fixture
def places(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Where a program begins, which is the current directory, and where it goes."""
    for name in ("begins", "goes"):
        (fresh / name).mkdir()
    monkeypatch.chdir(fresh / "begins")
    return fresh / "begins", fresh / "goes"


def run(vllm: FakeVllm) -> None:
    play(vllm.engine(), *(step_stats(generated=n) for n in range(5)))


def test_trace_and_core_s_files_lie_where_install_was_called(places: tuple[Path, Path]):
    begins, goes = places
    with fake_vllm() as vllm, kvhook.install(trace="run.kvh", ring_dir="rings") as session:
        os.chdir(goes)
        plan = read_plan()
        assert plan is not None
        assert (Path(plan.stem).parent, Path(plan.ring_dir)) == (begins, begins / "rings")
        run(vllm)
        assert session.files == [begins / "run.kvh"]
        assert [ring.parent for ring in session.rings] == [begins / "rings"]
    assert len(session.steps()) == 5
    assert not list(goes.iterdir())
    assert len(kvhook.open(begins / "run.kvh").steps()) == 5


def test_the_variables_mean_the_directory_that_they_were_read_in(
    places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
):
    begins, goes = places
    for name, value in {"KVHOOK": "1", "KVHOOK_TRACE": "traces/", "KVHOOK_DIR": "rings"}.items():
        monkeypatch.setenv(name, value)
    with fake_vllm() as vllm, kvhook.install() as session:
        os.chdir(goes)
        run(vllm)
        # a process that is started now has the same files
        assert os.environ["KVHOOK_TRACE"] == f"{begins}/traces/"
        assert os.environ["KVHOOK_DIR"] == f"{begins}/rings"
    assert [path.parent for path in session.files] == [begins / "traces"]
    assert list((begins / "rings").glob("*.ring"))
    assert not list(goes.iterdir())


def test_a_variable_that_is_absolute_or_not_set_stays_as_it_is():
    variables = {"KVHOOK_TRACE": "/data/run.kvh", "KVHOOK_DIR": ""}
    make_absolute(variables)
    assert variables == {"KVHOOK_TRACE": "/data/run.kvh", "KVHOOK_DIR": ""}


def test_install_works_where_the_current_directory_has_been_removed(places: tuple[Path, Path]):
    begins, goes = places
    os.chdir(goes)
    goes.rmdir()
    with fake_vllm() as vllm, kvhook.install(trace=begins / "run.kvh", ring_dir=begins) as session:
        run(vllm)
    assert len(session.steps()) == 5
    os.chdir(begins)


def test_the_cores_of_a_trace_are_found_after_the_directory_was_changed(places: tuple[Path, Path]):
    begins, goes = places
    for path in (ROOT / "tests/report/data").glob("baseline*.kvh"):
        shutil.copy(path, begins)
    there = len(kvhook.open(begins / "baseline.kvh").cores().steps())
    assert there
    trace, both = kvhook.open("baseline.kvh"), kvhook.open("baseline.kvh", "baseline.kvh")
    os.chdir(goes)
    assert len(trace.cores().steps()) == there
    assert both.cores().why_none == ""
