"""Trace events in JSON, which https://ui.perfetto.dev and Chrome's tracing page open.

Each engine is a process. Its steps are slices of one thread, what was done to it between steps (`Run.engine_events`)
those of another; usage, queue and tokens are counters; each request is an
asynchronous slice, with one more for each of its phases, and with flows to the steps in which it was scheduled, had its
first token and ended. What an engine core recorded is a process of its own: when it scheduled, when the model ran.

Times are those of the machine's monotonic clock, in microseconds with three decimals. ``otherData`` has the same moment
on the wall clock.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from kvhook.analysis.timeline import Timeline, timeline, timeline_of_cores
from kvhook.export.unknown import unknown
from kvhook.files import Opener
from kvhook.records.columns import Table
from kvhook.records.core import CoreRecords
from kvhook.records.tables import Records
from kvhook.ring.slots import slot_head
from kvhook.schema import STEP

#: Numbers of processes: of engines from 1 on (0 is the kernel's idle process), of engine cores from 1001 on.
_ENGINE, _CORE = 1, 1001
_STEPS, _MODEL = 1, 2
_DONE = 3
#: Counter -> its series: name and column.
_COUNTERS = {
    "KV cache usage (%)": (("used", "kv_cache_usage"),),
    "requests": (("running", "num_running_reqs"), ("waiting", "num_waiting_reqs")),
    "tokens": (
        ("prompt computed", "num_prompt_tokens_computed"),
        ("prompt cached", "num_prompt_tokens_cached"),
        ("generated", "num_generation_tokens"),
    ),
    "preemptions": (("preempted", "num_preempted_reqs"),),
}
#: What a step's slice tells when it is clicked.
_ARGUMENTS = (
    "step",
    "num_running_reqs",
    "num_waiting_reqs",
    "num_kv_blocks_used",
    "kv_cache_usage",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "num_prompt_tokens",
    "num_prompt_tokens_cached",
    "num_generation_tokens",
    "num_preempted_reqs",
    "num_finished_reqs",
)
_CORE_ARGUMENTS = (
    "step",
    "limited_by",
    "num_prefill_tokens",
    "num_recomputed_tokens",
    "num_decode_tokens",
    "num_running_reqs",
    "num_waiting_reqs",
    "num_kv_blocks_peak",
    "num_kv_blocks_cached",
    "num_kv_blocks_empty",
)
#: A flow binds to the step that is open at its time: an instant this long before the step's end, in ns.
_INSIDE = 1

Event = dict[str, Any]


def write(records: Records, path: Path, opener: Opener, cores: CoreRecords | None) -> None:
    """One file, compressed with gzip. The list of events is always closed."""
    other = {name: records.meta[name] for name in ("kvhook", "vllm", "monotonic_ns", "realtime_ns")}
    with gzip.GzipFile("", "wb", 6, opener(path), mtime=0) as file:
        file.write(b'{"displayTimeUnit": "ms", "otherData": ' + json.dumps(other, default=str).encode())
        file.write(b', "traceEvents": [\n')
        before = b""
        for event in events(records, cores):
            file.write(before + _json(event))
            before = b",\n"
        file.write(b"\n]}\n")


def _json(event: Event) -> bytes:
    """An event whose times are integers in nanoseconds. They become microseconds with three decimals; as a float they
    would lose digits after some months of uptime."""
    times = "".join(f', "{name}": {_microseconds(event.pop(name))}' for name in ("ts", "dur") if name in event)
    return f"{json.dumps(event)[:-1]}{times}}}".encode()


def _microseconds(nanoseconds: int) -> str:
    return f"{nanoseconds // 1000}.{nanoseconds % 1000:03d}"


def events(records: Records, cores: CoreRecords | None) -> Iterator[Event]:
    """Every event of a run."""
    for facts in records.meta["engines"]:
        number = facts["engine"]
        model = str(facts.get("model") or "").rstrip("/").rsplit("/", 1)[-1]
        done = [e for e in records.engine_events if number in e.engines or not e.engines]
        threads = {_STEPS: "steps"} | ({_DONE: "engine events"} if done else {})
        yield from _names(_ENGINE + number, f"engine {number}: {model or 'vLLM'}", threads)
        for event in done:
            about = {"kind": event.kind, "outcome": event.outcome, "calls": event.calls}
            end = max(event.ended_ns, event.began_ns)
            yield _slice(_ENGINE + number, _DONE, event.text, event.began_ns, end, about)
    yield from _steps(records)
    front = timeline(records.steps(columns=["engine", "step", "t_end_ns"]), records.requests())
    ends = records.steps(columns=["engine", "step", "t_start_ns", "t_end_ns"])
    yield from _requests(front, _ENGINE, _places(ends, "engine", "t_start_ns", "t_end_ns"))
    for number, facts in enumerate(cores.facts if cores is not None else ()):
        name = f"engine core {number} (process {facts.get('pid', '?')})"
        yield from _names(_CORE + number, name, {_STEPS: "scheduler", _MODEL: "model runs"})
    if cores is not None and len(cores):
        steps = cores.steps()
        yield from _core_steps(steps)
        inside = timeline_of_cores(cores.requests(), cores.preemptions(), cores.lookups())
        yield from _requests(inside, _CORE, _places(steps, "core", "t_schedule_ns", "t_scheduled_ns"))


def _names(pid: int, name: str, threads: Mapping[int, str]) -> Iterator[Event]:
    yield {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}}
    yield {"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": pid}}
    for tid, thread in threads.items():
        yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": thread}}


def _steps(records: Records) -> Iterator[Event]:
    last: dict[tuple[int, str], Any] = {}
    for slots, layout in records.chunks():
        slots = slots[slot_head(slots)["kind"] == STEP]
        if not len(slots):
            continue
        rows = _rows(records.table(slots, layout, "step"), "step")
        for row in rows:
            pid, start, end = _ENGINE + row["engine"], row["t_start_ns"], row["t_end_ns"]
            arguments = {name: row[name] for name in _ARGUMENTS if row.get(name) is not None}
            yield _slice(pid, _STEPS, "step", start, end, arguments)
            for name, series in _COUNTERS.items():
                values = {key: row[column] for key, column in series if row.get(column) is not None}
                if name.endswith("(%)"):
                    values = {key: round(100 * value, 4) for key, value in values.items()}
                # a counter keeps its value until it is told another one
                if values and last.get((pid, name)) != values:
                    last[pid, name] = values
                    yield {"ph": "C", "name": name, "pid": pid, "tid": 0, "ts": end, "args": values}


def _core_steps(steps: Table) -> Iterator[Event]:
    """What the scheduler did, and when the model ran: several batches may run at once, so these are asynchronous."""
    for row in _rows(steps, "core_step"):
        pid, number = _CORE + row["core"], row["step"]
        begin, scheduled, update, end = (row[f"t_{what}_ns"] for what in ("schedule", "scheduled", "update", "end"))
        arguments = {name: row[name] for name in _CORE_ARGUMENTS if row.get(name) is not None}
        yield _slice(pid, _STEPS, "schedule", begin, scheduled, arguments)
        if update is not None and end is not None:
            yield from _async(pid, "model", number, scheduled, update, {"step": number})
            yield _slice(pid, _STEPS, "update", update, end, {"step": number})


def _rows(table: Table, kind: str) -> Iterator[dict[str, Any]]:
    """Rows as dictionaries; None for what is not known."""
    names = table.dtype.names or ()
    masks = unknown(table, kind)
    columns = []
    for name in names:
        column = table[name].tolist()
        for i in masks[name].nonzero()[0].tolist() if name in masks else ():
            column[i] = None
        columns.append(column)
    for values in zip(*columns, strict=True):
        yield dict(zip(names, values, strict=True))


def _places(steps: Table, number: str, begin: str, end: str) -> dict[int, Table]:
    """Engine -> its steps with ``step``, ``begin`` and ``end``."""
    found = {}
    for engine in np.unique(steps[number]).tolist():
        mine = steps[steps[number] == engine]
        out = np.zeros(len(mine), [("step", "<i8"), ("begin", "<i8"), ("end", "<i8")])
        out["step"], out["begin"], out["end"] = mine["step"], mine[begin], mine[end]
        found[engine] = out
    return found


def _requests(lives: Timeline, first_pid: int, steps: Mapping[int, Table]) -> Iterator[Event]:
    spans: dict[int, list[tuple[float, float]]] = {}
    for row, begin, end in lives.preempted.tolist():
        spans.setdefault(row, []).append((begin, end))
    for i, row in enumerate(_rows(lives.requests, "timeline")):
        pid = first_pid + row["engine"]
        flow = f"{pid << 40 | i:#x}"
        begin = row["ended"] if row["arrived"] is None else row["arrived"]
        hidden = ("engine", "arrived", "scheduled", "first_token", "ended")
        arguments = {n: v for n, v in row.items() if n not in hidden and v is not None and v != -1}
        yield from _async(pid, "request", i, _ns(begin), _ns(row["ended"]), arguments, flow)
        moments = [("queued", row["arrived"]), ("prefill", row["scheduled"]), ("decode", row["first_token"])]
        known = [(name, at) for name, at in moments if at is not None] + [("", row["ended"])]
        for (name, at), (_, until) in pairwise(known):
            yield from _async(pid, name, i, _ns(at), _ns(max(at, until)), {"request": row["request"]})
        for at, until in spans.get(i, ()):
            yield from _async(pid, "preempted", i, _ns(at), _ns(until), {"request": row["request"]})
        yield from _flows(pid, flow, row, steps.get(row["engine"]))


def _flows(pid: int, flow: str, row: Mapping[str, Any], steps: Table | None) -> Iterator[Event]:
    """An instant in each step that matters to the request, which its slice is joined to by an arrow."""
    moments = {"scheduled": "first_step", "first token": "first_token_step", "ended": "last_step"}
    wanted = {row[column]: name for name, column in moments.items() if row[column] is not None and row[column] >= 0}
    numbers = sorted(wanted)
    for number in numbers:
        place = int(np.searchsorted(steps["step"], number)) if steps is not None else 0
        if steps is None or place >= len(steps) or steps["step"][place] != number:
            continue
        end = int(steps["end"][place])
        event = _slice(pid, _STEPS, f"{wanted[number]}: request {row['request']}", end - _INSIDE, end - _INSIDE, {})
        yield event | {"bind_id": flow, "flow_in": True, "flow_out": number != numbers[-1]}


def _slice(pid: int, tid: int, name: str, begin: int, end: int, arguments: Event) -> Event:
    times = {"ts": begin, "dur": max(0, end - begin)}
    return {"ph": "X", "cat": "kvhook", "name": name, "pid": pid, "tid": tid, **times, "args": arguments}


def _async(pid: int, name: str, number: int, begin: int, end: int, arguments: Event, flow: str = "") -> Iterable[Event]:
    """An asynchronous slice: slices of one name and number follow each other, those of different ones may overlap."""
    shared = {"cat": "kvhook", "name": name, "pid": pid, "tid": 0, "id": f"{pid}.{name}.{number}"}
    binding = {"bind_id": flow, "flow_out": True} if flow else {}
    return (
        {"ph": "b", **shared, **binding, "ts": begin, "args": arguments},
        {"ph": "e", **shared, "ts": max(begin, end)},
    )


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
