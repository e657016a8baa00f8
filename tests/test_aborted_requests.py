"""Aborted requests: in the rows, in the steps and in the summary, each once, whatever the release.

vLLM makes no stats of an aborted request. What the rows must hold stands here, from the script that the engine's core
plays (`tests/contracts/core.py`).
"""

from __future__ import annotations

import asyncio
import collections
import types
from typing import Any

import pytest

import kvhook
from tests.contracts.behaviour import ASYNC, ENGINE, V0_ENGINE, make_engine
from tests.contracts.core import Prompt, Said, Sent, add
from tests.contracts.core_engines import engines_of
from tests.contracts.loader import stubs

pytestmark = pytest.mark.usefixtures("fresh")

#: the signatures of add_request and abort_requests: 0.8.0, 0.8.5, 0.14.0 (`internal`); and what has happened since
V1_RELEASES = ["0.8.0", "0.8.5.post1", "0.9.2", "0.10.2", "0.13.0", "0.14.0", "0.19.1", "0.26.0", "0.32.0", "0.33.0"]
SYNC, ON_LOOP = f"{ENGINE}:LLMEngine", f"{ASYNC}:AsyncLLM"
ABORT, LENGTH = "abort", "length"


def play(engine: Any, *sent: Sent) -> None:
    engine.engine_core.plan += sent
    for _ in sent:
        engine.step()


@pytest.mark.parametrize("log_stats", [False, True], ids=["off", "on"])
@pytest.mark.parametrize("release", V1_RELEASES)
def test_six_requests_of_which_two_are_aborted_are_six_rows(release: str, log_stats: bool):
    names = ["0", "1", "2", "3", "4", "5"]
    with stubs(engines_of(release)), kvhook.install(ring_slots=64) as session:
        engine = make_engine(SYNC, log_stats=log_stats)
        for name in names:
            add(engine, name, Prompt(computed=10 + int(name)))
        play(engine, Sent(tuple(map(Said, names)), running=6), Sent(tuple(Said(n, tokens=2) for n in "014"), running=6))
        engine.abort_request(["1", "5"])
        play(engine, Sent(tuple(Said(n, finished=True) for n in "0234"), running=0))
        assert session.faults == {}
        steps, rows, summary = session.steps(), session.requests(), session.summary()
    assert engine.engine_core.aborted == ["1", "5"]
    assert collections.Counter(rows["finish_reason"].tolist()) == {ABORT: 2, LENGTH: 4}
    aborted = rows[rows["finish_reason"] == ABORT]
    assert aborted["request_id"].tolist() == [1, 5]
    assert aborted["num_prompt_tokens"].tolist() == [11, 15]
    # 0.8 keeps no clocks and no counts of a request, if its user left stats off; kvhook has turned them on
    assert aborted["num_generation_tokens"].tolist() == [3, 1]
    assert aborted["sample_index"].tolist() == [0, 0]
    assert steps["num_added_reqs"].tolist() == [6, 0, 0]
    assert steps["num_aborted_reqs"].tolist() == [0, 0, 2]
    assert steps["num_finished_reqs"].tolist() == [0, 0, 6]
    assert (summary.num_finished_reqs, summary.num_aborted_reqs) == (6, 2)
    assert summary.finished_by_reason == {"abort": 2, "length": 4}


@pytest.mark.parametrize("release", V1_RELEASES)
def test_at_level_light_they_are_counted(release: str):
    with stubs(engines_of(release)), kvhook.install(ring_slots=64, level="light") as session:
        engine = make_engine(SYNC, log_stats=False)
        for name in "abc":
            add(engine, name, Prompt(computed=10))
        play(engine, Sent((Said("a"), Said("b"), Said("c")), running=3))
        engine.abort_request(["b"])
        play(engine, Sent((Said("a", finished=True), Said("c")), running=1), Sent((Said("c", finished=True),)))
        steps, summary = session.steps(), session.summary()
        assert len(session.requests()) == 0
    assert steps["num_aborted_reqs"].tolist() == [0, 1, 0]
    assert steps["num_finished_reqs"].tolist() == [0, 2, 1]
    assert (summary.num_finished_reqs, summary.num_aborted_reqs) == (3, 1)


@pytest.mark.parametrize("release", V1_RELEASES)
def test_an_abort_after_the_last_step_is_there_at_the_next_reading_and_only_once(release: str):
    with stubs(engines_of(release)), kvhook.install(ring_slots=64) as session:
        engine = make_engine(SYNC, log_stats=False)
        for name in "ab":
            add(engine, name, Prompt(computed=10))
        play(engine, Sent((Said("a", finished=True), Said("b")), running=1))
        engine.abort_request(["b"])
        assert session.summary().num_aborted_reqs == 1
        assert len(session.requests()) == 2
        # the same id again: vLLM knows it no more
        engine.abort_request(["b"])
        add(engine, "c", Prompt(computed=10))
        play(engine, Sent((Said("c", finished=True),), running=0))
        rows, steps = session.requests(), session.steps()
        assert session.faults == {}
    assert rows["finish_reason"].tolist() == [LENGTH, ABORT, LENGTH]
    assert rows["request"].tolist() == [0, 1, 2]
    assert steps["num_aborted_reqs"].tolist() == [0, 1, 0]
    # a record that is there only for the aborted request is none of the steps that have times
    assert (steps["t_end_ns"] == steps["t_start_ns"]).tolist() == [False, True, False]


def test_an_abort_after_the_last_step_is_in_the_file_when_the_process_ends(fresh: Any):
    with stubs(engines_of("0.32.0")):
        kvhook.install(ring_slots=64, trace=fresh / "run.kvh")
        engine = make_engine(SYNC, log_stats=False)
        add(engine, "7", Prompt(computed=10))
        play(engine, Sent((Said("7"),), running=1))
        engine.abort_request(["7"])
        kvhook.uninstall()
    rows = kvhook.open(fresh / "run.kvh").requests()
    assert (rows["request_id"].tolist(), rows["finish_reason"].tolist()) == ([7], [ABORT])


@pytest.mark.parametrize("release", V1_RELEASES)
def test_each_sample_of_a_prompt_is_a_row_of_its_own(release: str):
    with stubs(engines_of(release)), kvhook.install(ring_slots=64) as session:
        engine = make_engine(SYNC, log_stats=False)
        ids = add(engine, "5", Prompt(computed=10), n=3)
        play(engine, Sent(tuple(map(Said, ids)), running=3), Sent((Said(ids[1], finished=True),), running=2))
        engine.abort_request(["5"])
        play(engine, Sent(running=0))
        assert session.faults == {}
        rows, steps = session.requests(), session.steps()
    assert sorted(zip(rows["sample_index"].tolist(), rows["finish_reason"].tolist(), strict=True)) == [
        (0, ABORT),
        (1, LENGTH),
        (2, ABORT),
    ]
    assert rows["request_id"].tolist() == [5, 5, 5]
    assert steps["num_added_reqs"].sum() == 3
    assert steps["num_aborted_reqs"].sum() == 2


@pytest.mark.parametrize("release", V1_RELEASES)
def test_samples_of_one_prompt_tell_which_they_are(release: str):
    with stubs(engines_of(release)), kvhook.install(ring_slots=64) as session:
        engine = make_engine(SYNC, log_stats=True)
        ids = add(engine, "5", Prompt(computed=10), n=4)
        (alone,) = add(engine, "6", Prompt(computed=10))
        play(engine, Sent((*(Said(i, finished=True) for i in reversed(ids)), Said(alone, finished=True)), running=0))
        rows = session.requests()
    assert rows["sample_index"].tolist() == [3, 2, 1, 0, 0]
    assert rows["request_id"].tolist() == [5, 5, 5, 5, 6]


@pytest.mark.parametrize("release", V1_RELEASES)
def test_on_an_event_loop_a_client_that_goes_away_is_a_row(release: str):
    with stubs(engines_of(release)), kvhook.install(ring_slots=64) as session:
        engine = make_engine(ON_LOOP, log_stats=False)
        for name in "123":
            add(engine, name, Prompt(computed=10))
        engine.engine_core.plan += [Sent((Said("1"), Said("2"), Said("3")), running=3)]
        asyncio.run(engine.handle_outputs())
        engine.abort(["2"])
        engine.engine_core.plan += [Sent((Said("1", finished=True),), running=1)]
        asyncio.run(engine.handle_outputs())
        engine.abort(["3"])
        assert session.faults == {}
        rows, steps = session.requests(), session.steps()
        assert session.summary().num_aborted_reqs == 2
    assert sorted(rows["finish_reason"].tolist()) == sorted([LENGTH, ABORT, ABORT])
    assert steps["num_added_reqs"].sum() == 3
    assert steps["num_finished_reqs"].sum() == 3


def test_what_is_known_of_an_aborted_request_is_in_its_row_and_the_rest_is_absent(monkeypatch: pytest.MonkeyPatch):
    with stubs(engines_of("0.32.0")), kvhook.install(ring_slots=64) as session:
        engine = make_engine(SYNC, log_stats=False)
        for name in ("0", "1"):
            add(engine, name, Prompt(computed=24, cached=16))
        running = engine.output_processor.request_states["0"]
        running.num_cached_tokens, running.max_tokens_param = 16, 50
        for name, value in {
            "queued_ts": 10.0,
            "scheduled_ts": 11.0,
            "first_token_ts": 13.5,
            "last_token_ts": 20.0,
        }.items():
            setattr(running.stats, name, value)
        running.stats.first_token_latency = 4.0
        engine.output_processor.request_states["1"].stats.queued_ts = 10.0
        engine.abort_request(["0", "1"])
        first, second = session.requests()
        assert session.faults == {}
    assert [first[n] for n in ("queued_time", "prefill_time", "decode_time", "inference_time")] == [1.0, 2.5, 6.5, 9.0]
    assert (first["num_cached_tokens"], first["max_tokens"], first["time_to_first_token"]) == (16, 50, 4.0)
    # the second had not been scheduled
    assert second["num_cached_tokens"] == -1
    assert all(second[n] != second[n] for n in ("queued_time", "prefill_time", "time_to_first_token"))


def test_an_abort_that_fails_in_vllm_fails_as_it_does_without_kvhook():
    with stubs(engines_of("0.32.0")), kvhook.install(ring_slots=64) as session:
        engine = make_engine(SYNC, log_stats=False)
        add(engine, "0", Prompt(computed=10))
        with pytest.raises(TypeError):
            engine.output_processor.abort_requests(17, internal=True)
        engine.abort_request(["0"])
        assert session.faults == {}
        assert session.requests()["finish_reason"].tolist() == [ABORT]


# V0


class Group:
    """V0's SequenceGroup, as far as it is looked at."""

    def __init__(self, request_id: str, prompt: int, output: int) -> None:
        self.request_id = request_id
        sequence = types.SimpleNamespace(get_prompt_len=lambda: prompt, get_output_len=lambda: output)
        self.get_seqs = lambda: [sequence]
        self.metrics = types.SimpleNamespace(arrival_time=100.0, first_token_time=101.5 if output else None)
        self.sampling_params = types.SimpleNamespace(max_tokens=32)


@pytest.mark.parametrize("release", ["0.6.0", "0.6.6", "0.7.3", "0.9.2", "0.10.2"])
def test_v0_has_a_row_for_each_aborted_request(release: str, monkeypatch: pytest.MonkeyPatch):
    from tests.contracts.made_stats import v0_stats

    modules = engines_of(release)
    with stubs(modules):
        module: Any = modules[V0_ENGINE]
        cls = next(c for c in (getattr(module, "_V0LLMEngine", None), module.LLMEngine) if c)

        def abort_request(engine: Any, request_id: Any) -> None:
            ids = {request_id} if isinstance(request_id, str) else set(request_id)
            for queue in (engine.scheduler[0].waiting, engine.scheduler[0].running, engine.scheduler[0].swapped):
                for group in [g for g in queue if g.request_id in ids]:
                    queue.remove(group)

        monkeypatch.setattr(cls, "abort_request", abort_request, raising=False)
        monkeypatch.setattr(
            cls,
            "_add_processed_request",
            lambda engine, group: engine.scheduler[0].waiting.append(group),
            raising=False,
        )
        monkeypatch.setattr(
            cls,
            "scheduler",
            [
                types.SimpleNamespace(
                    waiting=collections.deque(), running=collections.deque(), swapped=collections.deque()
                )
            ],
            raising=False,
        )
        with kvhook.install(ring_slots=64) as session:
            engine = make_engine(f"{V0_ENGINE}:{cls.__name__}", log_stats=False)
            for group in (Group("3", 12, 0), Group("4", 20, 5), Group("x", 7, 0)):
                engine._add_processed_request(group)
            queues = engine.scheduler[0]
            queues.running.append(queues.waiting[1])
            del queues.waiting[1]
            engine.abort_request(["4", "x"])
            engine.abort_request("4")
            engine.plan.append([v0_stats()])
            engine.step()
            assert session.faults == {}
            rows, steps = session.requests(), session.steps()
    aborted = rows[rows["finish_reason"] == ABORT]
    # V0 does not tell ids of finished requests: there is no such column, and no id of these
    assert "request_id" not in (rows.dtype.names or ())
    assert sorted(aborted["num_prompt_tokens"].tolist()) == [7, 20]
    (one,) = aborted[aborted["num_prompt_tokens"] == 20]
    assert one["num_generation_tokens"] == 5
    assert "max_tokens" not in (rows.dtype.names or ()) or one["max_tokens"] == 32
    assert "time_to_first_token" not in (rows.dtype.names or ()) or one["time_to_first_token"] == 1.5
    assert steps["num_aborted_reqs"].tolist() == [2]
    assert steps["num_added_reqs"].tolist() == [3]
