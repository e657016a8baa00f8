"""``kvhook autopsy``: how a run ended, and what changed before."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from kvhook.analysis.autopsy import Autopsy, changes, examine
from kvhook.cli import main
from kvhook.text.autopsy import sentences
from kvhook.trace import open_trace
from tests.ring.synthetic import Recording


def crash(directory: Path) -> Recording:
    """60 calm steps; then the cache fills, requests queue up and are preempted, steps take three times as long."""
    recording = Recording(directory)
    for n in range(60):
        if n in (20, 50):
            recording.finish(n, num_prompt_tokens=30, num_generation_tokens=9, finish_reason=n == 50)
        recording.step(0.4, took_ms=10)
    for n in range(16):
        recording.step(0.9 + n / 160, took_ms=30, num_waiting_reqs=n, num_preempted_reqs=n % 2, num_running_reqs=7)
    return recording


def of(recording: Recording) -> Autopsy:
    return examine(open_trace(recording.path), "killed")


def test_what_changed_is_said_in_words(tmp_path: Path):
    assert sentences(of(crash(tmp_path)).changes) == [
        "steps became slower: a median of 30 ms over the last 16, 10 ms before (3.0 times)",
        "KV cache usage rose from a median of 40.0 % to 99.4 % in the last step",
        "the queue grew: 15 requests waited in the last step, a median of 0 before",
        "8 preemptions in the last 16 steps, 0 in the 60 before",
    ]


def test_nothing_changed(tmp_path: Path):
    assert of(Recording(tmp_path).run(50)).changes == []


@pytest.mark.parametrize("steps", range(9))
def test_few_steps_are_no_ground_for_words(tmp_path: Path, steps: int):
    recording = Recording(tmp_path).run(steps)
    autopsy = of(recording)
    assert autopsy.changes == []
    assert len(autopsy.last_steps) == steps
    assert autopsy.still_running == (4 if steps else None)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "faster": (
        {"took_ms": 20},
        {"took_ms": 5},
        ["steps became faster: a median of 5 ms over the last 10, 20 ms before"],
    ),
    "usage fell": (
        {"usage": 0.8},
        {"usage": 0.1},
        ["KV cache usage fell from a median of 80.0 % to 10.0 % in the last step"],
    ),
    "full all along": (
        {"usage": 0.99},
        {"usage": 0.99},
        ["the KV cache was full: 99.0 % in the last step, a median of 99.0 % before"],
    ),
    "queue shrank": (
        {"num_waiting_reqs": 12},
        {"num_waiting_reqs": 0},
        ["the queue shrank: 0 requests waited in the last step, a median of 12 before"],
    ),
    "preempted all along": ({"num_preempted_reqs": 1}, {"num_preempted_reqs": 1}, []),
    "stats failed": (
        {},
        {"has_scheduler_stats": 0, "kv_cache_usage": float("nan")},
        ["10 of the last 10 steps brought no stats"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_change(tmp_path: Path, name: str):
    before, end, told = CASES[name]
    recording = Recording(tmp_path)
    for values in [before] * 30 + [end] * 10:
        usage = values.get("kv_cache_usage", values.get("usage", 0.5))
        recording.step(usage, **{k: v for k, v in values.items() if k not in ("usage", "kv_cache_usage")})
    assert sentences(changes(open_trace(recording.path).steps())) == told


def test_one_long_step_stands_out(tmp_path: Path):
    recording = Recording(tmp_path).run(50)
    recording.step(took_ms=2000)
    recording.run(3)
    assert sentences(of(recording).changes) == ["one of the last 13 steps took 2 s, 200 times the median"]


def test_columns_that_this_vllm_does_not_fill_are_no_ground_either(tmp_path: Path):
    gone = {"kv_cache_usage": "no", "num_waiting_reqs": "no", "num_preempted_reqs": "no", "num_running_reqs": "no"}
    recording = Recording(tmp_path, absent={"step": gone, "request": {}}).run(40)
    autopsy = of(recording)
    assert (autopsy.changes, autopsy.still_running, autopsy.still_waiting) == ([], None, None)


def test_the_whole_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recording = crash(tmp_path).die()
    assert main(["autopsy", "-n", "3", "--dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"process {os.getpid()} (serve.py), engine 0: {recording.path}\n")
    for part in (
        "it was killed (kill -9, out of memory)",
        "KV cache usage rose",
        "7 running and 15 waiting after the last step",
        "finished: request 20 in step 20, stop, 30 + 9 tokens, after 1.5 s",
        "finished: request 50 in step 50, length, 30 + 9 tokens, after 1.5 s",
        "The last 3 steps",
        "What is left of the run",
        "tiny-llama: 76 steps",
        "peak 99.4 %",
    ):
        assert part in out, out
    rows = [line for line in out.splitlines() if line.split()[:1] in (["73"], ["74"], ["75"])]
    assert len(rows) == 3
    assert max(map(len, out.splitlines()[1:])) <= 125


def test_the_last_record_counts_even_if_the_head_had_not_moved(tmp_path: Path):
    recording = Recording(tmp_path).run(5)
    recording.ring.words[16] = 4
    recording.die()
    assert len(open_trace(recording.path).steps()) == 5


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    crash(tmp_path).die()
    assert main(["autopsy", "--json", "--dir", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["ended"], found["still_running"], found["still_waiting"]) == ("killed", 7, 15)
    assert len(found["last_steps"]) == 20
    assert found["last_requests"][-1]["finish_reason"] == "length"
    assert found["summary"]["steps"] == 76
    assert len(found["changes"]) == 4


def test_which_ring(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    where = ["--dir", str(tmp_path)]
    alive = Recording(tmp_path, engine=0).run(9)
    assert main(["autopsy", *where]) == 1
    assert "still runs, and nobody else has left a ring: kvhook tail" in capsys.readouterr().err
    Recording(tmp_path, engine=1).run(1).close()
    assert main(["autopsy", *where]) == 0
    assert "closed cleanly" in capsys.readouterr().out
    Recording(tmp_path, engine=2).run(2).die().age(100)
    Recording(tmp_path, engine=3).run(3).die().age(50)
    Recording(tmp_path, engine=4).run(4).close()
    for argv, steps in (
        ([], 3),
        (["--engine", "2"], 2),
        (["--engine", "4"], 4),
        ([str(os.getpid()), "--engine", "2"], 2),
    ):
        assert main(["autopsy", "--json", *argv, *where]) == 0
        assert json.loads(capsys.readouterr().out)["summary"]["steps"] == steps
    assert main(["autopsy", "--engine", "0", *where]) == 1
    assert "still runs: kvhook tail" in capsys.readouterr().err
    assert main(["autopsy", str(alive.path)]) == 0
    assert "this is how it is now" in capsys.readouterr().out


def test_a_trace_can_be_looked_at_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    crash(tmp_path / "r").die().spool_to(tmp_path / "run.kvh", 40)
    assert main(["autopsy", str(tmp_path / "run.kvh")]) == 0
    assert "39 steps" in capsys.readouterr().out


def test_the_temporary_history_of_the_process_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    recording = crash(tmp_path / "r").die()
    pid, start, _ = recording.path.name.split("-")
    history = tmp_path / f"kvhook-history-{pid}-{start}-abc"
    history.mkdir()
    monkeypatch.setattr("kvhook.ring.place.history_root", lambda: tmp_path)
    assert main(["autopsy", "--dir", str(tmp_path / "r")]) == 0
    assert f"is in the .kvh files in {history}" in capsys.readouterr().out
