"""What was exported opens again: the same arrays, the same summary; and a file that is none is an error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import kvhook
from kvhook.errors import KvhookError
from tests.conftest import ROOT

DATA = ROOT / "tests" / "data"
TRACES = ("engine-0.32.0-full.kvh", "engine-0.32.0-light.kvh", "scripted-sparse.kvh")
COLUMNAR = (".parquet", ".arrow")


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


@pytest.mark.parametrize("suffix", [*COLUMNAR, ".jsonl"])
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


@pytest.mark.parametrize("suffix", COLUMNAR)
@pytest.mark.parametrize("name", TRACES)
def test_latencies_and_summary_are_those_of_the_trace(name: str, suffix: str, tmp_path: Path):
    trace, again = exported(name, suffix, tmp_path)
    for series in ("time_to_first_token", "inter_token_latency"):
        one, other = (np.sort(np.repeat(*each.latencies(series))) for each in (trace, again))
        np.testing.assert_array_equal(one, other)
    told, told_again = trace.summary().as_dict(), again.summary().as_dict()
    assert {name for name in told if told[name] != told_again[name]} <= {"core"}


def test_parts_of_an_exported_run_can_be_cut(tmp_path: Path):
    pytest.importorskip("pyarrow")
    trace, again = exported(TRACES[0], ".parquet", tmp_path)
    same(trace[5:9].steps(), again[5:9].steps())
    assert again[5:9].summary().steps == 4


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
