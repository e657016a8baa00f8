"""Labels: who gets which, what is noted of a request, and what a trace says of the requests with one."""

from __future__ import annotations

import asyncio
import json
import threading
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvhook
from kvhook.adapters.requests import aborted_v1
from kvhook.analysis.totals import Totals
from kvhook.errors import KvhookError
from kvhook.facts import clean_facts
from kvhook.hooks.noted import Notes
from kvhook.labels import current_label
from kvhook.recording.notebook import MOST_NAMES, Notebook
from kvhook.records.clock import Clock
from kvhook.records.events import Events
from kvhook.records.part import FOREVER, StepRanges, inside, outside
from kvhook.records.selection import STEP_KEYS, by_number, steps_of_requests
from kvhook.ring.reader import RingReader
from kvhook.ring.trace_file import TraceWriter
from tests.ring.synthetic import LAYOUT, Recording

# Who gets which


def notebook(labels: Any = None, key: Any = lambda _: 7) -> Notebook:
    return Notebook(lambda: None, labels, key)


def names_of(book: Notebook) -> dict[int, str]:
    return {event[2]: event[3] for event in book.everything() if event[:2] == ["name", "label"]}


def test_a_label_holds_inside_of_its_block_and_an_inner_one_replaces_it():
    with kvhook.label("outer"):
        with kvhook.label("inner"):
            assert current_label() == "inner"
        assert current_label() == "outer"
    assert current_label() == ""

    @kvhook.label("decorated")
    def label_inside() -> str:
        return current_label()

    assert label_inside() == "decorated"


def test_threads_and_tasks_have_labels_of_their_own():
    seen = {}

    async def agent(name: str) -> None:
        with kvhook.label(name):
            await asyncio.sleep(0)
            seen[name] = current_label()

    async def both() -> None:
        await asyncio.gather(agent("a"), agent("b"))

    with kvhook.label("main"):
        asyncio.run(both())
        thread = threading.Thread(target=lambda: seen.update(thread=current_label()))
        thread.start()
        thread.join()
    assert seen == {"a": "a", "b": "b", "thread": ""}


@pytest.mark.parametrize(
    ("labels", "request_id", "label"),
    [
        (None, "agent-7/12", ""),
        ("/", "agent-7/12", "agent-7"),
        ("/", "team/agent/12", "team/agent"),
        ("/", "12", ""),
        (lambda name: name[:5], "agent-7/12", "agent"),
        (lambda name: None, "agent-7/12", ""),
        (lambda name: name, "x" * 999, "x" * 200),
    ],
)
def test_a_request_id_tells_its_label(labels: Any, request_id: str, label: str):
    book = notebook(labels)
    code, lora = book.label_request(0, request_id, "")
    assert lora == -1
    assert names_of(book).get(code, "") == label
    with kvhook.label("around"):
        code, _ = book.label_request(0, request_id, "")
    assert names_of(book)[code] == (label or "around")


def test_a_request_without_label_and_adapter_costs_no_event():
    book = notebook()
    assert book.label_request(0, "12", "") == (-1, -1)
    assert not book.due
    assert book.label_request(0, "12", "adapter") == (-1, 0)
    # that an adapter is used for the first time is an event of the engine as well
    assert [event[0] for event in book.take()] == ["name", "request", "engine_event"]
    assert not book.due


def test_events_of_labelled_requests_are_believed_whatever_their_keys():
    # keys have 63 bits; what is read out of a file is believed up to 62
    book = notebook("/", lambda request_id: (1 << 63) - 1 - int(request_id[2:]))
    for number in range(3):
        book.label_request(0, f"a/{number}", "")
    read, events = clean_facts(json.loads(json.dumps({"events": book.take()}))), Events()
    events.take(read["events"])
    assert events.names["label"] == {0: "a"}
    assert [one.request_key for one in events.requests] == [(1 << 63) - 1 - number for number in range(3)]
    again = Events()
    again.take(events.as_list())
    assert again.requests == events.requests


def test_more_labels_than_can_be_told_apart_share_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kvhook.recording.notebook.MOST_NAMES", 3)
    book = notebook("/")
    codes = [book.label_request(0, f"{i}/x", "")[0] for i in (0, 1, 2, 3, 4, 0)]
    assert codes == [0, 1, 2, 3, 3, 0]
    assert names_of(book)[3] == "(other labels)"
    assert MOST_NAMES > 1000


def test_events_that_could_not_be_written_come_first_next_time():
    book = notebook("/")
    book.label_request(0, "a/1", "")
    first = book.take()
    book.label_request(0, "a/2", "")
    book.put_back(first)
    assert [event[0] for event in book.take()] == ["name", "request", "request"]


@pytest.mark.parametrize("labels", ["", 3, b"/"])
def test_what_can_tell_no_label_is_an_error(labels: Any, fresh: Path):
    with pytest.raises(KvhookError, match="a separator in request ids"):
        kvhook.install(labels=labels)


# What is noted of a request


def state(request_id: str, parent: Any = None, **more: Any) -> Any:
    return types.SimpleNamespace(request_id=request_id, parent_req=parent, **more)


def test_samples_of_a_prompt_share_its_number_and_others_have_their_own():
    told: list[tuple[Any, str]] = []

    def note(request_id: Any, lora: str) -> tuple[int, int]:
        told.append((request_id, lora))
        return 3, 4

    notes = Notes(note)
    parent = types.SimpleNamespace(request_id="p")
    states = [state("a"), state("0_p", parent), state("1_p", parent), state("b", lora_name="french")]
    for each in states:
        notes.take(each)
    assert [each.kvhook_prompt_number for each in states] == [0, 1, 1, 2]
    assert told == [("a", ""), ("p", ""), ("p", ""), ("b", "french")]
    assert (states[0].kvhook_label, states[0].kvhook_lora_name) == (3, 4)
    aborted = aborted_v1(states[3])
    assert (aborted.prompt_number, aborted.label, aborted.lora_name) == (2, 3, 4)
    assert aborted_v1(state("older")).label == -1


# What a trace says


def trace_with_labels(folder: Path) -> kvhook.Trace:
    """Ten steps of 10 ms. Requests by their last step: label, prompt tokens, cached ones, latency, adapter."""
    recording = Recording(folder / "r")
    recording.clock = 10**12
    requests = {
        3: [(0, 100, 50, 0.015, -1)],
        5: [(1, 80, 0, 0.025, 0), (0, 60, 30, 0.035, -1)],
        9: [(-1, 40, 40, 0.005, -1), (1, 20, -1, 0.001, 0)],
    }
    for number in range(10):
        for label, prompt, cached, latency, lora in requests.get(number, ()):
            recording.finish(
                number, label=label, lora_name=lora, num_prompt_tokens=prompt, num_cached_tokens=cached,
                num_generation_tokens=2, e2e_latency=latency, time_to_first_token=latency / 2, finish_reason=1,
                t_end_ns=recording.clock + 10**7,
            )  # fmt: skip
        recording.step(num_running_reqs=1)
    writer = TraceWriter(folder / "run.kvh", LAYOUT, {"kvhook": "0.2.0", "vllm": "0.32.0"})
    writer.append_meta(0, recording.meta)
    names = [["name", "label", 0, "agent-0"], ["name", "label", 1, "agent-1"], ["name", "lora_name", 0, "french"]]
    writer.append_meta(0, {"events": names})
    with RingReader(recording.path) as reader:
        writer.append(reader.now())
    writer.close()
    return kvhook.open(folder / "run.kvh")


def test_rows_of_requests_name_their_label_and_adapter(tmp_path: Path):
    requests = trace_with_labels(tmp_path).requests()
    assert requests["label"].tolist() == ["agent-0", "agent-1", "agent-0", "", "agent-1"]
    assert requests["lora_name"].tolist() == ["", "french", "", "", "french"]
    assert requests["t_end_ns"].tolist() == [10**12 + n * 10**7 for n in (4, 6, 6, 10, 10)]


def test_the_summary_has_a_hit_rate_for_each_label_and_adapter(tmp_path: Path):
    summary = trace_with_labels(tmp_path).summary()
    rates = [(r.name, r.requests, r.num_prompt_tokens, r.num_cached_tokens, r.hit_rate) for r in summary.by_label]
    # of the second agent's requests one does not say what was cached
    assert rates == [("agent-0", 2, 160, 80, 0.5), ("agent-1", 2, 100, 0, 0.0), ("", 1, 40, 40, 1.0)]
    assert [(r.name, r.requests) for r in summary.by_lora_name] == [("", 3), ("french", 2)]
    text = str(summary)
    assert "labels          agent-0: 50.0 %, 80 of 160 prompt tokens cached, 2 requests" in text
    assert "without a label: 100.0 %, 40 of 40 prompt tokens cached, 1 request" in text
    assert "LoRA            no adapter" in text


def test_requests_without_a_label_count_also_where_the_first_label_comes_later(fresh: Path):
    recording = Recording(fresh / "r")
    whole, parts = Totals(), Totals()
    for number in range(4):
        recording.finish(number, label=-1 if number < 3 else 0, lora_name=-1, num_prompt_tokens=10, num_cached_tokens=5)
        recording.step()
    with RingReader(recording.path) as reader:
        slots = reader.now()
    whole.take(slots, LAYOUT)
    for at in range(0, len(slots), 2):
        parts.take(slots[at : at + 2], LAYOUT)
    for totals in (whole, parts):
        counts = {code: group["requests"] for code, group in totals.of().requests.groups["label"].items()}
        assert counts == {-1: 3, 0: 1}


def test_the_steps_of_a_label_are_those_its_requests_were_in(tmp_path: Path):
    trace = trace_with_labels(tmp_path)
    # finished in 3 after 15 ms, in 5 after 35 ms; in 5 after 25 ms, in 9 after 1 ms
    assert trace.select(label="agent-0").steps()["step"].tolist() == [2, 3, 4, 5]
    assert trace.select(label="agent-1").steps()["step"].tolist() == [3, 4, 5, 9]
    assert trace.select(label="agent-1").requests()["request"].tolist() == [1, 4]
    assert trace[5:].select(label="agent-1").requests()["request"].tolist() == [1, 4]


def test_the_summary_of_a_label_is_of_its_requests_and_says_what_steps_cannot_tell(tmp_path: Path):
    summary = trace_with_labels(tmp_path).summary(label="agent-0")
    assert (summary.num_finished_reqs, summary.num_prompt_tokens, summary.num_prompt_tokens_cached) == (2, 160, 80)
    assert (summary.prefix_cache_hit_rate, summary.num_generation_tokens) == (0.5, 4)
    assert summary.finished_by_reason == {"length": 2}
    assert summary.time_to_first_token.count == 2
    assert summary.time_to_first_token.max == pytest.approx(0.0175)
    assert summary.prefix_cache_queries is None
    assert "all requests in it together" in summary.not_recorded["inter_token_latency"]
    assert "hit rate 50.0 % of these requests: 80 of 160 prompt tokens cached" in str(summary)
    with pytest.raises(KvhookError, match="labelled 'agent-2'; there are 'agent-1', 'agent-0'"):
        kvhook.open(tmp_path / "run.kvh").summary(label="agent-2")


def test_labels_of_traces_side_by_side_are_told_apart(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, two = trace_with_labels(tmp_path / "a"), trace_with_labels(tmp_path / "b")
    both = kvhook.open(one.name, two.name)
    assert both.requests()["label"].tolist() == one.requests()["label"].tolist() * 2
    assert [(r.name, r.requests) for r in both.summary().by_label] == [
        ("agent-0", 4), ("agent-1", 4), ("", 2),
    ]  # fmt: skip


# Arithmetic of parts

INTERVALS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)).map(lambda t: (t[0], t[0] + t[1])), max_size=6)


@given(INTERVALS, st.lists(st.integers(0, 90), max_size=30))
def test_inside_and_outside_are_what_a_loop_says(intervals: list[tuple[int, int]], values: list[int]):
    array = np.array(values, np.int64)
    expected = [any(begin <= value <= end for begin, end in intervals) for value in values]
    assert inside(array, intervals).tolist() == expected
    assert inside(array, outside(intervals)).tolist() == [not each for each in expected]
    assert outside([]) == [(-1, FOREVER)]


STEPS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 25)), max_size=40)


@given(STEPS, STEPS)
def test_step_ranges_hold_exactly_their_steps(chosen: list[tuple[int, int]], asked: list[tuple[int, int]]):
    engines, steps = (np.array([c[i] for c in chosen], np.int64) for i in (0, 1))
    ranges = StepRanges(engines, steps)
    found = ranges.hold(np.array([e for e, _ in asked], np.int32), np.array([s for _, s in asked], np.int64))
    assert found.tolist() == [each in set(chosen) for each in asked]
    assert set(ranges.engines) == {engine for engine, _ in chosen}


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.data())
def test_steps_of_requests_are_what_a_loop_says(took: list[int], data: st.DataObject):
    ends = np.cumsum(took) * 1_000_000
    keys = np.zeros(len(took), [(name, "<i8") for name in STEP_KEYS])
    keys["step"], keys["t_end_ns"] = np.arange(len(took)) + 5, ends
    rows = data.draw(st.lists(st.tuples(st.integers(0, len(took) - 1), st.integers(0, 300)), max_size=5))
    requests = np.zeros(len(rows), [("engine", "<i8"), ("step", "<i8"), ("e2e_latency", "<f8")])
    expected = set()
    for i, (last, latency) in enumerate(rows):
        requests[i] = (0, last + 5, latency / 1e3)
        expected |= {n for n in range(last + 1) if ends[n] > ends[last] - latency * 1_000_000} | {last}
    assert set(steps_of_requests(keys, requests).nonzero()[0].tolist()) == expected


@given(st.lists(st.integers(0, 30), unique=True, min_size=1), st.integers(-40, 40), st.integers(-40, 40))
def test_slices_are_those_of_a_list_of_all_steps(numbers: list[int], start: int, stop: int):
    keys = np.zeros(len(numbers), [(name, "<i8") for name in STEP_KEYS])
    keys["step"] = sorted(numbers)
    expected = set(list(range(max(numbers) + 1))[start:stop]) & set(numbers)
    assert set(keys["step"][by_number(keys, slice(start, stop))].tolist()) == expected


# Clocks


def test_a_clock_that_was_set_during_the_run_is_followed():
    start, year = 5 * 10**12, 1_700_000_000 * 10**9
    clock = Clock({start: year, start + 10**10: year + 10**10 + 1_000_000})
    assert clock.drift_ns == 1_000_000
    moments = np.array([start, start + 5 * 10**9, start + 10**10, start + 2 * 10**10, start - 10**9, -1])
    expected = [0, 5 * 10**9 + 500_000, 10**10 + 1_000_000, 2 * 10**10 + 1_000_000, -(10**9)]
    assert clock.unix(moments).tolist() == [*(year + n for n in expected), -1]
    assert Clock({}).unix(moments).tolist() == [-1] * 6
    assert Clock({}).drift_ns == 0
