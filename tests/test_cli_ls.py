"""``kvhook ls``, and finding, choosing and pruning rings."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from kvhook.cli import main
from kvhook.cli.ls import as_text
from kvhook.discovery import cleaning
from kvhook.discovery.cleaning import prune
from kvhook.discovery.rings import ALIVE, CLOSED_RING, DAMAGED, DEAD, choose, find_rings
from kvhook.errors import KvhookError
from kvhook.ring import directory, place
from kvhook.ring.directory import directories
from tests.conftest import give_away
from tests.ring.synthetic import Recording
from tests.standin import fake_vllm, step_stats


def test_each_ring_with_its_state_and_how_far_it_has_come(tmp_path: Path):
    alive = Recording(tmp_path, engine=0).run(12)
    Recording(tmp_path, engine=1).run(3).die()
    Recording(tmp_path, engine=2).run(500).close()
    Recording(tmp_path, engine=3)
    (tmp_path / f"{os.getpid()}-5-4.ring").write_bytes(b"KVHOOK01 and no more")
    (tmp_path / "notes.ring").write_bytes(b"not one of ours")
    found = {r.engine: r for r in find_rings([tmp_path])}
    assert {e: r.state for e, r in found.items()} == {0: ALIVE, 1: DEAD, 2: CLOSED_RING, 3: ALIVE, 4: DAMAGED}
    assert [found[e].steps for e in range(4)] == [12, 3, 500, 0]
    assert found[0].bytes == alive.path.stat().st_size
    assert (found[0].model, found[0].program, found[0].vllm, found[0].kvhook) == (
        "tiny-llama",
        "serve.py",
        "0.32.0",
        "0.1.0",
    )
    assert "too short" in found[4].problem


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    Recording(tmp_path, engine=0, model="m" * 50).run(1234)
    Recording(tmp_path, engine=1).run(3).die().age(7200)
    assert main(["ls", "--dir", str(tmp_path)]) == 0
    heading, one, two, *_, last = capsys.readouterr().out.splitlines()
    assert heading.split() == ["PID", "ENGINE", "STATE", "MODEL", "PROGRAM", "STEPS", "AGE", "SIZE"]
    assert one.split()[:3] == [str(os.getpid()), "0", "alive"]
    assert one.split()[5] == "1,234"
    assert f"...{'m' * 29} " in one
    assert two.split()[1:5] == ["1", "dead", "tiny-llama", "serve.py"]
    assert "2.0 h" in two
    assert last == f"in {tmp_path}"
    assert one.index("alive") == two.index("dead") == heading.index("STATE")


def test_json_is_for_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recording = Recording(tmp_path).run(4)
    assert main(["ls", "--json", "--dir", str(tmp_path)]) == 0
    (ring,) = json.loads(capsys.readouterr().out)
    assert (ring["pid"], ring["engine"], ring["state"], ring["steps"]) == (os.getpid(), 0, "alive", 4)
    assert ring["path"] == str(recording.path)
    assert abs(ring["started"] - time.time()) < 60


def test_no_rings(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["ls", "--dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "There are no rings" in out
    assert str(tmp_path) in out
    assert main(["ls", "--json", "--dir", str(tmp_path / "none")]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_a_recording_shows_up_with_its_engines_told_apart_and_so_does_the_trace(
    fresh: Path, capsys: pytest.CaptureFixture[str]
):
    import kvhook

    with fake_vllm() as vllm:
        session = kvhook.install(trace=fresh / "run.kvh")
        one, two = vllm.engine(), vllm.engine()
        for n, engine in enumerate((one, two, two)):
            engine.plan.append(step_stats(generated=n))
            engine.step()
        assert main(["ls", "--json", "--dir", str(fresh / "rings")]) == 0
        listed = {r["engine"]: r for r in json.loads(capsys.readouterr().out)}
        assert {e: (r["state"], r["steps"]) for e, r in listed.items()} == {0: ("alive", 1), 1: ("alive", 2)}
        assert {r["pid"] for r in listed.values()} == {os.getpid()}
        assert sorted(Path(r["path"]) for r in listed.values()) == sorted(session.rings)
        del one, engine
        states = {r.engine: r.state for r in find_rings([fresh / "rings"])}
        assert states == {0: CLOSED_RING, 1: ALIVE}, "deleting an engine closes its ring, and only its ring"
        kvhook.uninstall()
    trace = kvhook.open(fresh / "run.kvh")
    assert trace.steps(0)["num_generation_tokens"].tolist() == [0]
    assert trace.steps(1)["num_generation_tokens"].tolist() == [1, 2]
    assert trace.steps()["engine"].tolist().count(1) == 2


def test_rings_are_looked_for_in_all_places_but_not_in_planted_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    good, link, missing, asked = (tmp_path / name for name in ("good", "link", "missing", "asked"))
    good.mkdir()
    link.symlink_to(good)
    monkeypatch.setattr(directory, "default_directories", lambda: [link, good, missing])
    monkeypatch.delenv(place.ENV_DIR)
    assert directories() == [good]
    monkeypatch.setenv(place.ENV_DIR, str(asked))
    assert directories() == [asked, good]
    assert directories(tmp_path) == [tmp_path]


def test_what_belongs_to_somebody_else_is_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    theirs = tmp_path / "theirs"
    Recording(theirs).run(1)
    give_away(theirs, 4242)
    monkeypatch.setattr(directory, "default_directories", lambda: [theirs])
    monkeypatch.delenv(place.ENV_DIR)
    assert directories() == []
    (ring,) = theirs.iterdir()
    give_away(ring, 4242)
    assert find_rings([theirs]) == []


def test_choosing(tmp_path: Path):
    Recording(tmp_path, engine=0).run(1).age(50)
    Recording(tmp_path, engine=1).run(1).age(30)
    Recording(tmp_path, engine=2).run(1).die().age(40)
    Recording(tmp_path, engine=3).run(1).close().age(10)
    found = find_rings([tmp_path])
    assert [r.engine for r in found] == [3, 1, 2, 0]
    assert choose(found).engine == 1
    assert choose(found, engine=0).engine == 0
    assert choose(found, os.getpid()).engine == 1
    assert choose(found, prefer=(DEAD, CLOSED_RING)).engine == 2
    with pytest.raises(KvhookError, match=rf"no ring of process 12; there are rings of {os.getpid()}: kvhook ls"):
        choose(found, 12)
    with pytest.raises(KvhookError, match=r"no ring; a program makes one with kvhook\.install"):
        choose([])


def test_a_process_in_another_container_counts_as_alive(tmp_path: Path):
    # Its number means nothing here: that there is no such process here says nothing.
    Recording(tmp_path, engine=0, pid_namespace=place.pid_namespace() + 1).run(1).die()
    (ring,) = find_rings([tmp_path])
    assert (ring.state, ring.elsewhere) == (ALIVE, True)
    assert prune(tmp_path, 0, 0) == []
    assert "in another container" in as_text([ring], time.time())


def test_pruning_takes_the_oldest_and_never_a_live_one(tmp_path: Path):
    for engine in range(6):
        Recording(tmp_path, engine=engine, slots=64).run(1).die().age(100 - engine)
    live = Recording(tmp_path, engine=9, slots=64).run(1).age(10_000)
    removed = prune(tmp_path, most_rings=4)
    assert len(removed) == 2
    assert sorted(r.engine for r in find_rings([tmp_path])) == [2, 3, 4, 5, 9]
    size = live.path.stat().st_size
    prune(tmp_path, most_bytes=int(2.5 * size))
    assert sorted(r.engine for r in find_rings([tmp_path])) == [4, 5, 9]
    prune(tmp_path, 0, 0)
    assert sorted(r.engine for r in find_rings([tmp_path])) == [5, 9], (
        "the newest stays, for whoever asks what happened"
    )


def test_making_a_ring_prunes_and_failing_to_do_so_harms_nothing(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    import kvhook

    for engine in range(100, 120):
        Recording(fresh / "rings", engine=engine, slots=64).run(1).die()
    with fake_vllm() as vllm, kvhook.install():
        vllm.engine()
        assert len(find_rings([fresh / "rings"])) == cleaning.MOST_RINGS + 1
        monkeypatch.setattr("kvhook.recording.recorder.prune", lambda place: 1 / 0)
        engine = vllm.engine()
        engine.plan.append(step_stats(generated=5))
        engine.step()
        session = kvhook.install()
        assert session.steps(1)["num_generation_tokens"].tolist() == [5]
        assert session.faults == {}
