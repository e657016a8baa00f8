"""``kvhook clean``: what ended processes have left goes, what is in use stays."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from kvhook.cli import main
from kvhook.discovery.cleaning import leftovers, prune_histories
from kvhook.discovery.rings import find_rings
from kvhook.ring.place import process_start
from tests.conftest import give_away
from tests.ring.synthetic import Recording

DAY = 24 * 3600


@pytest.fixture
def history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "disk"
    folder.mkdir()
    monkeypatch.setattr("kvhook.ring.place.history_root", lambda: folder)
    return folder


def make_history(root: Path, pid: int, start: int, age: float) -> Path:
    folder = root / f"kvhook-history-{pid}-{start}-x1y2z3"
    folder.mkdir()
    file = folder / "000000.kvh"
    file.write_bytes(b"x" * 5000)
    at = time.time() - age
    os.utime(file, (at, at))
    return folder


@pytest.fixture
def litter(tmp_path: Path, history: Path) -> Path:
    """Rings of every kind and age, and histories."""
    place = tmp_path / "rings"
    Recording(place, engine=0).run(3).age(2 * DAY)  # alive, however old
    Recording(place, engine=1).run(3).die().age(2 * DAY)
    Recording(place, engine=2).run(3).die()
    Recording(place, engine=3).run(3).close().age(2 * DAY)
    Recording(place, engine=4).run(3).close()
    (place / "keep.ring").write_bytes(b"not ours")
    (place / "notes.txt").write_bytes(b"not ours either")
    make_history(history, os.getpid(), process_start(os.getpid()), 2 * DAY)  # alive
    make_history(history, 4194999, 5, 2 * DAY)
    make_history(history, 4194998, 5, 60)
    (history / "kvhook-history-none").mkdir()
    return place


def left(place: Path, history: Path) -> tuple[list[int], list[str]]:
    return sorted(r.engine for r in find_rings([place])), sorted(p.name.split("-")[2] for p in history.iterdir())


def test_by_default_what_is_older_than_a_day(litter: Path, history: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["clean", "--dir", str(litter)]) == 0
    assert left(litter, history) == ([0, 2, 4], sorted([str(os.getpid()), "4194998", "none"]))
    out = capsys.readouterr().out
    assert out.count("removed") == 3
    assert out.splitlines()[-1].endswith("freed; 3 younger than a day kept (--all takes them too)")
    assert (litter / "keep.ring").exists()
    assert (litter / "notes.txt").exists()


def test_all(litter: Path, history: Path):
    assert main(["clean", "--all", "--dir", str(litter)]) == 0
    assert left(litter, history) == ([0], sorted([str(os.getpid()), "none"]))


def test_dry_run_only_says(litter: Path, history: Path, capsys: pytest.CaptureFixture[str]):
    before = left(litter, history)
    assert main(["clean", "--all", "--dry-run", "--dir", str(litter)]) == 0
    assert left(litter, history) == before
    out = capsys.readouterr().out
    assert out.count("would be removed") == 6
    assert "would be freed" in out


def test_nothing_to_clean(tmp_path: Path, history: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["clean", "--dir", str(tmp_path / "none")]) == 0
    assert capsys.readouterr().out == "0.0 kB freed\n"


def test_a_ring_that_is_just_being_made_stays(tmp_path: Path, history: Path):
    # its magic is stored last; its name says that its process runs
    place = tmp_path / "rings"
    place.mkdir()
    (place / f"{os.getpid()}-{process_start(os.getpid())}-0.ring").write_bytes(b"\0" * 9000)
    (place / "4194999-5-0.ring").write_bytes(b"\0" * 9000)
    assert [x.path.name for x in leftovers([place], history)] == ["4194999-5-0.ring"]


def test_a_link_among_the_histories_is_not_followed(tmp_path: Path, history: Path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("...")
    (history / "kvhook-history-4194999-5-abc").symlink_to(precious)
    assert main(["clean", "--all", "--dir", str(tmp_path / "none")]) == 0
    assert (precious / "thesis.tex").exists()


def test_the_histories_of_others_are_theirs(history: Path):
    folder = make_history(history, 4194999, 5, 2 * DAY)
    give_away(folder, 4242)
    assert leftovers([], history) == []


def test_age_is_counted_from_the_last_step(tmp_path: Path, history: Path):
    recording = Recording(tmp_path / "rings").run(1)
    recording.patch(realtime_ns=time.time_ns() - 3 * DAY * 10**9)
    recording.clock += 2 * DAY * 10**9 + 12 * 3600 * 10**9
    recording.step()
    recording.close()
    (one,) = leftovers([tmp_path / "rings"], history)
    assert 11 * 3600 < one.age < 13 * 3600


def test_old_histories_go_when_a_new_one_is_made(history: Path):
    old = make_history(history, 4194999, 5, 2 * DAY)
    new = make_history(history, 4194998, 5, 60)
    prune_histories(history)
    assert not old.exists()
    assert new.exists()


def test_what_cannot_be_removed_is_said(
    litter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("kvhook.cli.clean.remove", lambda one: False)
    assert main(["clean", "--dir", str(litter)]) == 1
    assert "cannot be removed" in capsys.readouterr().out
