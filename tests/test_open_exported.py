"""What was exported opens again: the same arrays, the same summary; and a file that is none is an error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvhook
from kvhook.errors import KvhookError
from tests.conftest import ROOT

DATA = ROOT / "tests" / "data"
TRACES = ("engine-0.32.0-full.kvh", "engine-0.32.0-light.kvh", "scripted-sparse.kvh")
COLUMNAR = (".parquet", ".arrow")
ALL = (*COLUMNAR, ".csv", ".jsonl")


def exported(name: str, suffix: str, folder: Path) -> tuple[kvhook.Trace, kvhook.Trace]:
    if suffix in COLUMNAR:
        pytest.importorskip("pyarrow")
    trace = kvhook.open(DATA / name)
    trace.dump(folder / f"run{suffix}")
    return trace, kvhook.open(folder / f"run{suffix}")


def same(one: np.ndarray, other: np.ndarray) -> None:
    assert one.dtype.names == other.dtype.names
    for name in one.dtype.names or ():
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.parametrize("suffix", ALL)
@pytest.mark.parametrize("name", TRACES)
def test_arrays_are_those_of_the_trace(name: str, suffix: str, tmp_path: Path):
    trace, again = exported(name, suffix, tmp_path)
    same(trace.steps(), again.steps())
    if suffix == ".jsonl" and not len(trace.requests()):
        assert len(again.requests()) == 0  # lines do not say which columns a table without rows has
    else:
        same(trace.requests(), again.requests())
    same(trace.steps(complete=True), again.steps(complete=True))
    assert [s.path for s in again.scopes] == [s.path for s in trace.scopes]


@pytest.mark.parametrize("suffix", ALL)
@pytest.mark.parametrize("name", TRACES)
def test_latencies_and_summary_are_those_of_the_trace(name: str, suffix: str, tmp_path: Path):
    trace, again = exported(name, suffix, tmp_path)
    for series in ("time_to_first_token", "inter_token_latency"):
        one, other = (np.sort(np.repeat(*each.latencies(series))) for each in (trace, again))
        np.testing.assert_array_equal(one, other)
    told, told_again = trace.summary().as_dict(), again.summary().as_dict()
    assert {name for name in told if told[name] != told_again[name]} <= {"core"}


@pytest.mark.parametrize("suffix", ALL)
def test_parts_of_an_exported_run_can_be_cut(suffix: str, tmp_path: Path):
    trace, again = exported(TRACES[0], suffix, tmp_path)
    same(trace[5:9].steps(), again[5:9].steps())
    assert again[5:9].summary().steps == 4
    same(trace.select(engine=0).requests(), again.select(engine=0).requests())
    moments = trace.steps()["t_end_unix_ns"][[2, 6]] / 1e9 + 1e-6
    same(trace.between(*moments).steps(), again.between(*moments).steps())
    assert 3 <= len(again.between(*moments).steps()) <= 5


def test_a_folder_of_exports_opens_each_run_once(tmp_path: Path):
    pytest.importorskip("pyarrow")
    exported(TRACES[0], ".parquet", tmp_path)
    shutil.copy(tmp_path / "run.parquet", tmp_path / "other.parquet")
    both = kvhook.open(tmp_path)
    assert [Path(e["trace"]).name for e in both.meta["engines"]] == ["other.parquet", "run.parquet"]


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.jsonl", "", "no line with the facts about the run"),
        ("a.jsonl", "hello\n", "line 1, is not one that kvhook has exported"),
        ("a.jsonl", '{"kind": "meta"}\n', "does not say which engines"),
        ("a.jsonl", '{"kind": "meta", "engines": []}\n{"kind": "step", "step": 1}\n', "it has no column engine"),
        ("a.csv", "", "it has no column engine"),
        ("a.csv", "a,b\r\n1,2\r\n", "it has no column engine"),
        ("a.csv", "engine,step\r\nx,2\r\n", "is not a table that kvhook has exported"),
        ("a.parquet", "PAR1 nonsense", "cannot be read"),
        ("a.arrow", "nonsense", "cannot be read"),
    ],
)
def test_a_file_of_another_kind_is_an_error_that_says_why(name: str, content: str, why: str, tmp_path: Path):
    if not name.endswith("jsonl"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_text(content)
    with pytest.raises(KvhookError, match=why):
        kvhook.open(tmp_path / name)


def test_a_parquet_file_of_somebody_else_is_an_error(tmp_path: Path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"a": [1]}), tmp_path / "theirs.parquet")
    with pytest.raises(KvhookError, match="was not written by kvhook"):
        kvhook.open(tmp_path / "theirs.parquet")


def test_a_run_without_steps_and_a_line_that_was_cut_off_open(tmp_path: Path):
    path = tmp_path / "run.jsonl"
    meta = {"kind": "meta", "engines": [{"engine": 0}], "monotonic_ns": 1, "realtime_ns": 10**18}
    path.write_text(json.dumps(meta) + "\n")
    assert len(kvhook.open(path).steps()) == 0
    assert kvhook.open(path).summary().steps == 0
    step = {"kind": "step", "engine": 0, "step": 0, "t_start_ns": 5, "t_end_ns": 9, "has_scheduler_stats": 1}
    path.write_text(json.dumps(meta) + "\n" + json.dumps(step) + '\n{"kind": "st')
    assert kvhook.open(path).steps()["t_end_ns"].tolist() == [9]


def test_a_folder_of_many_runs_opens_as_a_run_of_several_engines(tmp_path: Path):
    pytest.importorskip("pyarrow")
    fleet = f"{tmp_path}/fleet/"
    traces = {name: kvhook.open(DATA / name) for name in TRACES[:2]}
    both = kvhook.open(*(DATA / name for name in TRACES[:2]))
    both.dump(fleet, run="a, two engines")
    traces[TRACES[0]].dump(fleet, run="b/one")
    again = kvhook.open(fleet)
    assert [e["trace"] for e in again.meta["engines"]] == ["a, two engines"] * 2 + ["b/one"]
    for number, trace in enumerate((traces[TRACES[0]], traces[TRACES[1]], traces[TRACES[0]])):
        steps = again.steps(number)
        for name in (trace.steps().dtype.names or ())[1:]:
            np.testing.assert_array_equal(steps[name], trace.steps()[name], err_msg=name)
    one = kvhook.open(f"{fleet}run=b%2Fone")
    same(one.steps(), traces[TRACES[0]].steps())
    same(one.requests(), traces[TRACES[0]].requests())
    assert (
        one.summary().as_dict()["time_to_first_token"] == traces[TRACES[0]].summary().as_dict()["time_to_first_token"]
    )
    (single,) = (tmp_path / "fleet" / "run=b%2Fone").glob("engine=0/steps.parquet")
    same(kvhook.open(single).steps(), traces[TRACES[0]].steps())
    assert len(again.select(engine=2).steps()) == len(traces[TRACES[0]].steps())


def test_the_wall_clock_is_the_same_again_where_the_machines_clock_was_adjusted(tmp_path: Path):
    trace = kvhook.open(DATA / TRACES[0])
    ends = trace.steps(columns=["t_end_ns"])["t_end_ns"]
    trace.engines.events.clocks.update({int(at): int(at) + 10**18 + 777 * i for i, at in enumerate(ends[::9])})
    assert trace.meta["clock_drift_ns"] != 0
    assert len(np.unique(trace.steps()["t_end_unix_ns"] - ends)) > 10
    trace.dump(tmp_path / "run.jsonl")
    again = kvhook.open(tmp_path / "run.jsonl")
    same(trace.steps(), again.steps())
    assert again.meta["clock_drift_ns"] == trace.meta["clock_drift_ns"]


@pytest.mark.parametrize("suffix", ALL)
def test_what_engine_cores_recorded_is_the_same_again(suffix: str, tmp_path: Path):
    trace, again = exported("whole/run.kvh", suffix, tmp_path)
    for table in ("steps", "requests", "preemptions", "lookups", "blocks", "block_lives", "prefixes"):
        one, other = (getattr(each.cores(), table)() for each in (trace, again))
        same(one, other)
    same(trace.steps(), again.steps())
    same(trace.requests(), again.requests())
    assert again.summary().as_dict() == trace.summary().as_dict()
    assert again.summary().as_dict() == trace.summary().as_dict()
    parts: list[dict[str, Any]] = [{"scope": "samples"}, {"label": "cook"}, {"scope": "generate"}]
    for part in parts:
        same(trace.select(**part).steps(), again.select(**part).steps())
        same(trace.select(**part).cores().steps(), again.select(**part).cores().steps())
        assert again.summary(**part).as_dict() == trace.summary(**part).as_dict()


def test_cores_of_a_run_in_a_folder_of_many_are_there_again(tmp_path: Path):
    pytest.importorskip("pyarrow")
    trace = kvhook.open(DATA / "whole" / "run.kvh")
    trace.dump(f"{tmp_path}/fleet/")
    again = kvhook.open(tmp_path / "fleet")
    same(trace.cores().lookups(), again.cores().lookups())
    assert again.summary().as_dict() == trace.summary().as_dict()


def test_every_time_of_every_table_is_told_on_the_wall_clock_too(tmp_path: Path):
    trace = kvhook.open(DATA / "whole" / "run.kvh")
    cores = trace.cores()
    offset = trace.meta["realtime_ns"] - trace.meta["monotonic_ns"]
    tables = [trace.steps(), trace.requests(), cores.steps(), cores.requests(), cores.preemptions(), cores.lookups()]
    for table in [*tables, cores.blocks()]:
        names = [name for name in table.dtype.names or () if name.startswith("t_") and not name.endswith("_unix_ns")]
        assert names
        for name in names:
            known = table[name] >= 0
            wall = table[name.replace("_ns", "_unix_ns")]
            assert known.any()
            assert (wall[~known] == -1).all()
            # both clocks of this run were read once in ten seconds; NTP moved them less than a millisecond
            assert (np.abs(wall[known] - table[name][known] - offset) < 1e6).all()
