"""Tables for other libraries, times since 1970, and traces that are pickled."""

from __future__ import annotations

import pickle
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvhook
from kvhook.errors import KvhookError
from tests.conftest import ROOT

TRACES = ROOT / "tests" / "data"


@pytest.fixture(params=["engine-0.32.0-full.kvh", "engine-0.32.0-light.kvh", "scripted-sparse.kvh"])
def trace(request: pytest.FixtureRequest) -> kvhook.Trace:
    return kvhook.open(TRACES / request.param)


def test_times_since_1970_are_the_monotonic_ones_moved_by_what_the_header_says(trace: kvhook.Trace):
    steps = trace.steps(columns=["t_start_ns", "t_end_unix_ns", "t_end_ns"])
    assert steps.dtype.names == ("t_start_ns", "t_end_unix_ns", "t_end_ns")
    moved = trace.meta["realtime_ns"] - trace.meta["monotonic_ns"]
    np.testing.assert_array_equal(steps["t_end_unix_ns"] - steps["t_end_ns"], moved)
    with pytest.raises(KvhookError, match="no column 't_begin_unix_ns'"):
        trace.steps(columns=["t_begin_unix_ns"])


def test_between_takes_moments_of_other_clocks(trace: kvhook.Trace):
    ends = trace.steps(columns=["t_end_unix_ns"])["t_end_unix_ns"]
    first, last = int(ends[2]) - 1000, int(ends[5]) + 1000
    seconds = trace.between(first / 1e9, last / 1e9).steps(columns=["step"])
    moments = (datetime.fromtimestamp(at / 1e9, timezone.utc) for at in (first, last))
    assert set(range(2, 6)) <= set(seconds["step"].tolist()) <= set(range(1, 8))
    assert {3, 4} <= set(trace.between(*moments).steps(columns=["step"])["step"].tolist())


def missing(value: Any) -> bool:
    return value is None or type(value).__name__ == "NAType" or value != value


@pytest.mark.parametrize("table", ["steps", "requests"])
@pytest.mark.parametrize("library", ["pandas", "polars", "arrow"])
def test_a_table_holds_what_the_array_holds_and_nothing_for_what_is_not_known(
    trace: kvhook.Trace, library: str, table: str
):
    pytest.importorskip("pyarrow" if library == "arrow" else library)
    if library == "polars":
        pytest.importorskip("pyarrow")
    rows = getattr(trace, table)()
    frame = getattr(trace, f"to_{library}")(table)
    names = frame.column_names if library == "arrow" else list(frame.columns)
    assert names == list(rows.dtype.names)
    if table == "steps":
        assert "t_start_unix_ns" in names
    for name in rows.dtype.names:
        column = frame[name]
        values = column.to_pylist() if library == "arrow" else column.to_list()
        there = [not missing(value) for value in values]
        # what is missing is what an array has a blank for
        assert set(rows[name][~np.array(there, bool)].tolist()) <= {-1, 0} or rows[name].dtype.kind == "f"
        assert [v for v, known in zip(values, there, strict=True) if known] == rows[name][there].tolist()


def test_an_unknown_table_is_an_error(trace: kvhook.Trace):
    pytest.importorskip("pandas")
    with pytest.raises(KvhookError, match="no table 'rows'; there are 'steps', 'requests', 'core_steps'"):
        trace.to_pandas("rows")


def test_a_pickled_trace_is_the_same_without_its_file(tmp_path: Path, trace: kvhook.Trace):
    path = tmp_path / "run.kvh"
    trace.dump(path)
    data = pickle.dumps(kvhook.open(path))
    path.unlink()
    again = pickle.loads(data)
    for one, other in ((trace.steps(), again.steps()), (trace.requests(), again.requests())):
        assert one.dtype == other.dtype
        for name in one.dtype.names or ():
            np.testing.assert_array_equal(one[name], other[name])
    told, told_again = trace.summary().as_dict(), again.summary().as_dict()
    assert {name for name in told if told[name] != told_again[name]} <= {"core"}
    part = pickle.loads(pickle.dumps(trace[2:4]))
    assert len(part.steps()) == len(trace[2:4].steps()) == 2
