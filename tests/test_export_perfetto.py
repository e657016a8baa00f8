"""The export for Perfetto keeps the published rules of the trace event format, and its numbers are those of the trace.

Perfetto's own trace processor is a binary that is fetched from the network when it is first used, so that it is asked
only where it is there already (TRACE_PROCESSOR names it). The rules: "Trace Event Format", Google, 2016, and
docs/getting-started/other-formats.md of Perfetto.
"""

from __future__ import annotations

import gzip
import json
import math
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

import kvhook
from tests.ring.synthetic import Recording

DATA = Path(__file__).parent / "data"
REPORT_DATA = Path(__file__).parent / "report" / "data"
TRACES = [
    *(DATA / f"{name}.kvh" for name in ("engine-0.32.0-full", "engine-0.32.0-light", "scripted-sparse")),
    *(REPORT_DATA / f"{name}.kvh" for name in ("baseline", "grouped")),
]
every_trace = pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)

Event = dict[str, Any]


def written(trace: kvhook.Trace, folder: Path) -> dict[str, Any]:
    (path,) = trace.dump(folder / "run.perfetto.json.gz")
    content: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()), parse_constant=pytest.fail)
    return content


def check_rules(events: list[Event]) -> None:
    """What the format demands of each kind of event, and of those that belong together."""
    slices: dict[Any, list[tuple[float, float]]] = defaultdict(list)
    opened: dict[Any, list[Event]] = defaultdict(list)
    flows: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        assert event["ph"] in "XCbeM"
        assert isinstance(event["pid"], int)
        assert event["pid"] > 0
        assert isinstance(event["name"], str)
        assert event["name"]
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "process_sort_index", "thread_name")
            continue
        assert math.isfinite(event["ts"])
        assert event["ts"] >= 0
        if event["ph"] == "X":
            assert event["dur"] >= 0
            slices[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
        elif event["ph"] == "C":
            assert event["args"]
            assert all(isinstance(v, (int, float)) and math.isfinite(v) for v in event["args"].values())
        elif event["ph"] == "b":
            opened[event["cat"], event["id"], event["name"]].append(event)
        else:
            begun = opened[event["cat"], event["id"], event["name"]].pop()
            assert begun["pid"] == event["pid"]
            assert begun["ts"] <= event["ts"]
        if "bind_id" in event:
            int(event["bind_id"], 16)
            flows[event["bind_id"]].append(event)
    assert not any(opened.values()), "an asynchronous slice has no end"
    for of_thread in slices.values():
        check_nesting(of_thread)
    for flow in flows.values():
        check_flow(flow)


def check_nesting(slices: list[tuple[float, float]]) -> None:
    """Complete events of one thread lie in each other or apart."""
    stack: list[float] = []
    for begin, end in sorted(slices, key=lambda s: (s[0], -s[1])):
        while stack and stack[-1] <= begin + 1e-6:
            stack.pop()
        assert not stack or end <= stack[-1] + 1e-3, "slices of one thread overlap"
        stack.append(end)


def check_flow(flow: list[Event]) -> None:
    """It begins once, in an asynchronous slice, and if it goes on it ends."""
    flow = sorted(flow, key=lambda e: e["ts"])
    first, *others = flow
    assert (first["ph"], first["flow_out"], first.get("flow_in", False)) == ("b", True, False)
    assert all(e["ph"] == "X" and e["flow_in"] for e in others)
    assert [bool(e["flow_out"]) for e in others] == [True] * (len(others) - 1) + [False] * bool(others)


@every_trace
def test_every_event_keeps_the_rules(path: Path, tmp_path: Path):
    check_rules(written(kvhook.open(path), tmp_path)["traceEvents"])


@every_trace
def test_there_is_a_slice_for_each_step_and_one_for_each_request(path: Path, tmp_path: Path):
    trace = kvhook.open(path)
    events = written(trace, tmp_path)["traceEvents"]
    steps = [e for e in events if e["ph"] == "X" and e["name"] == "step"]
    table = trace.steps()
    assert [e["args"]["step"] for e in steps] == table["step"].tolist()
    assert [round(e["ts"] * 1000) for e in steps] == table["t_start_ns"].tolist()
    assert [round(e["dur"] * 1000) for e in steps] == (table["t_end_ns"] - table["t_start_ns"]).tolist()
    generated = sum(e["args"].get("num_generation_tokens", 0) for e in steps)
    if "num_generation_tokens" in (table.dtype.names or ()) and trace.summary().steps_by_level.keys() <= {
        "full",
        "light",
    }:
        assert generated == table["num_generation_tokens"].sum()
    begun = [e for e in events if e["ph"] == "b" and e["name"] == "request" and e["pid"] < 1000]
    assert len(begun) == len(trace.requests())
    inside = [e for e in events if e["ph"] == "b" and e["name"] == "request" and e["pid"] > 1000]
    assert len(inside) == len(trace.cores().requests())


def test_the_phases_of_a_request_are_vllms_durations(tmp_path: Path):
    trace = kvhook.open(TRACES[0])
    events = written(trace, tmp_path)["traceEvents"]
    begins = {(e["name"], e["args"]["request"]): e["ts"] for e in events if e["ph"] == "b"}
    ids = {e["id"]: (e["name"], e["args"]["request"]) for e in events if e["ph"] == "b"}
    took = {ids[e["id"]]: (e["ts"] - begins[ids[e["id"]]]) / 1e6 for e in events if e["ph"] == "e"}
    requests = trace.requests()
    assert len(requests) == 12
    for row in requests:
        for name, column in (("request", "e2e_latency"), ("prefill", "prefill_time"), ("decode", "decode_time")):
            assert took[name, int(row["request"])] == pytest.approx(row[column], abs=1e-6)


def test_the_clock_can_be_put_onto_the_wall(tmp_path: Path):
    trace = kvhook.open(TRACES[0])
    other = written(trace, tmp_path)["otherData"]
    assert (other["monotonic_ns"], other["realtime_ns"]) == (trace.meta["monotonic_ns"], trace.meta["realtime_ns"])


def test_nanoseconds_are_kept_after_months_of_uptime(tmp_path: Path):
    recording = Recording(tmp_path / "rings")
    recording.clock = 123 * 86_400_000_000_000 + 7
    recording.step()
    trace = kvhook.open(recording.path)
    (path,) = trace.dump(tmp_path / "run.perfetto.json.gz")
    assert b'"ts": 10627200000000.007' in gzip.decompress(path.read_bytes())


def test_a_run_without_steps_is_an_empty_list_that_is_closed(tmp_path: Path):
    trace = kvhook.open(Recording(tmp_path / "rings").path)
    assert [e["ph"] for e in written(trace, tmp_path)["traceEvents"]] in ([], ["M"] * 3)


def test_names_may_hold_anything(tmp_path: Path):
    recording = Recording(tmp_path / "rings", model='a"b\\<script>\n\u2028')
    recording.step()
    events = written(kvhook.open(recording.path), tmp_path)["traceEvents"]
    assert events[0]["args"]["name"] == 'engine 0: a"b\\<script>??'


@pytest.mark.skipif("TRACE_PROCESSOR" not in os.environ, reason="TRACE_PROCESSOR names no trace_processor_shell")
@every_trace
def test_perfettos_own_trace_processor_reads_it(path: Path, tmp_path: Path):
    processor = pytest.importorskip("perfetto.trace_processor")
    trace = kvhook.open(path)
    (file,) = trace.dump(tmp_path / "run.perfetto.json.gz")
    config = processor.TraceProcessorConfig(bin_path=os.environ["TRACE_PROCESSOR"])
    with processor.TraceProcessor(trace=str(file), config=config) as tp:
        (row,) = tp.query("select count(*) as n from slice where name = 'step'")
        assert row.n == len(trace.steps())
        (row,) = tp.query("select sum(value) as n from stats where severity = 'error'")
        assert row.n == 0
