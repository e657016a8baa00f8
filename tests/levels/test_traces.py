"""What a trace tells of the levels of its run, and what its exports and the command line make of it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

import kvhook
from kvhook import hooks
from kvhook.cli import main
from kvhook.schema import COUNTED, FULL_ONLY
from tests.contracts.core_engines import SYNC
from tests.contracts.light.script import begin, go
from tests.levels.stepped_down import CHANGES, COUNTED_STEPS, STEPS, over_budget, script

pytestmark = pytest.mark.usefixtures("fresh")


# What the trace tells of it


def check_levels(meta: dict[str, Any]) -> None:
    (engine,) = meta["engines"]
    first, *changes = engine["levels"]
    assert first == {"step": 0, "level": "full"}
    assert {c["step"]: (c["level"], c["every"]) for c in changes} == CHANGES
    for change in changes:
        assert change["share"] > 1e-9
        assert change["why"] == f"kvhook took {change['share']:.2%} of the time inside steps, 0.00% are allowed"
    assert engine["max_overhead"] == 1e-9


@pytest.mark.usefixtures("hasty")
def test_the_session_and_its_trace_tell_step_level_every_share_and_why(fresh: Path, said: Any):
    session, _ = over_budget(trace=fresh / "run.kvh")
    check_levels(session.meta)
    kvhook.uninstall()
    check_levels(session.meta)
    check_levels(kvhook.open(fresh / "run.kvh").meta)
    assert ["from step 1 on the level is light" in text for text in said()] == [True, False, False, False]
    assert all("max_overhead" in text or "are allowed" in text for text in said())


@pytest.mark.usefixtures("hasty")
def test_uninstalled_at_once_the_file_has_it_too(fresh: Path):
    session, _ = over_budget(1, trace=fresh / "run.kvh")
    kvhook.uninstall()
    trace = kvhook.open(fresh / "run.kvh")
    assert len(trace.steps()) == 1
    assert [c["level"] for c in trace.meta["engines"][0]["levels"]] == ["full", "light"]
    assert trace.summary().level_changes == session.summary().level_changes != []


@pytest.mark.usefixtures("hasty")
def test_read_right_after_the_step_it_is_there():
    session, _ = over_budget(1)
    assert [c["level"] for c in session.meta["engines"][0]["levels"]] == ["full", "light"]
    assert "step 1: light, because" in str(session.summary())


@pytest.mark.usefixtures("hasty")
def test_it_is_there_also_if_the_step_was_drained_before_it_was_told(monkeypatch: pytest.MonkeyPatch):
    step_down = hooks.step_down

    def drained_meanwhile(*given: Any) -> bool:
        assert len(kvhook.install().steps()) == 1
        return step_down(*given)

    monkeypatch.setattr(hooks, "step_down", drained_meanwhile)
    session, _ = over_budget(1)
    assert [c["level"] for c in session.meta["engines"][0]["levels"]] == ["full", "light"]


@pytest.mark.usefixtures("hasty")
def test_an_engine_that_is_deleted_after_it_has_told_it():
    session, engine = over_budget(3)
    del engine
    assert [c["level"] for c in session.meta["engines"][0]["levels"]] == ["full", "light"]


@pytest.mark.usefixtures("hasty")
def test_a_bounded_history_that_has_dropped_the_change_still_tells_it():
    session, _ = over_budget(6000, history="1MB")
    assert session.meta["records_dropped"] > 0
    check_levels(session.meta)


# Columns and reasons


def test_a_light_session_gives_no_reason_for_what_it_has_and_no_false_hope():
    with kvhook.install(level="light") as session:
        go(begin(SYNC, script=script(3)))
        absent, names = session.meta["absent"], set(session.steps().dtype.names or ())
        whys = session.meta["engines"][0]["absent"]["step"]
    assert not names & absent.keys()
    assert "level='light'" in absent["ttft_count"]
    # what no level has in this vLLM says so
    assert whys["num_swapped_reqs"] == "vLLM's v1 engine has no such number"
    assert "level" not in whys["cpu_kv_cache_usage"]


# Exports


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_exports_leave_out_what_was_not_recorded(fresh: Path, suffix: str):
    session, _ = over_budget()
    session.dump(fresh / f"run{suffix}")
    text = (fresh / f"run{suffix}").read_text()
    if suffix == ".csv":
        rows: list[Any] = list(csv.DictReader(text.splitlines()))
        unknown: Any = ""
    else:
        rows = [row for row in map(json.loads, text.splitlines()) if row["kind"] == "step"]
        unknown = None
    assert len(rows) == STEPS
    full_only = set(FULL_ONLY) & rows[0].keys()
    counted = set(COUNTED) & rows[0].keys()
    assert {"ttft_count", "itl_sum", "num_corrupted_reqs"} <= full_only
    assert {"num_generation_tokens", "num_finished_reqs", "num_prompt_tokens_external"} <= counted
    for i, row in enumerate(rows):
        if i:  # the first is at level full
            assert {row[name] for name in full_only} == {unknown}, i
        if i in COUNTED_STEPS:
            assert int(row["num_generation_tokens"]) == i + 2
            assert unknown not in {row[name] for name in counted}, i
        else:
            assert {row[name] for name in counted} == {unknown}, i
        assert int(row["num_running_reqs"]) == 2 + i
    assert int(rows[0]["ttft_count"]) == 2


@pytest.mark.usefixtures("hasty")
def test_a_dumped_trace_is_the_same_run(fresh: Path):
    session, _ = over_budget()
    session.dump(fresh / "run.kvh")
    again = kvhook.open(fresh / "run.kvh")
    check_levels(again.meta)
    assert again.steps().tolist() == session.steps().tolist()
    assert str(again.summary()) == str(session.summary())


# The command line


def record(path: Path, steps: int = 9, **install: Any) -> Path:
    kvhook.uninstall()
    with kvhook.install(trace=path, **install):
        go(begin(SYNC, script=script(steps)))
    return path


@pytest.mark.usefixtures("hasty")
def test_full_light_and_sparse_side_by_side(fresh: Path, capsys: pytest.CaptureFixture[str]):
    full, light = record(fresh / "full.kvh"), record(fresh / "light.kvh", level="light")
    sparse = record(fresh / "sparse.kvh", 20, max_overhead=1e-9)
    assert main(["summary", str(full), str(light), str(sparse)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["full", "light", "sparse"]
    cells = {line[:28].strip(): line[28:].split("  ") for line in lines[1:]}
    row = {name: [cell.strip() for cell in some if cell.strip()] for name, some in cells.items()}
    assert row["generated tokens"] == ["54", "54", "-"]
    assert row["prompt tokens"] == ["50", "50", "-"]
    assert row["prompt tokens computed"] == ["34", "34", "-"]
    assert row["running peak"] == ["10", "10", "21"]
    assert row["time to first token p50"][1] == "-"
    assert row["time to first token p50"][0] == row["time to first token p50"][2] == "100 ms"
    both = kvhook.open(full, light)
    assert both.steps(0)["num_generation_tokens"].tolist() == both.steps(1)["num_generation_tokens"].tolist()
    assert both.summary().steps_by_level == {"full": 9, "light": 9}
    assert "ttft_count" not in both.meta["absent"]


def test_light_traces_go_through_every_verb(fresh: Path, capsys: pytest.CaptureFixture[str]):
    with kvhook.install(level="light", trace=fresh / "light.kvh") as session:
        go(begin(SYNC, script=script(20)))
        (ring,) = session.rings
    for verb in (["tail", ring], ["autopsy", ring], ["summary", ring], ["summary", "--json", fresh / "light.kvh"]):
        assert main(list(map(str, verb))) == 0, verb
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err
    for name in ("out.csv", "out.jsonl"):
        assert main(["export", str(fresh / "light.kvh"), str(fresh / name)]) == 0
