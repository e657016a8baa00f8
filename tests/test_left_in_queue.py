"""How many requests are left in the queue after the last step: every place says what vLLM's front end has.

A stop string ends a request in the front end. The scheduler's stats of that step were made before, and count it still;
if no other step comes, vLLM's stats never say that it is gone. What must be told is the length of the front end's own
``request_states``, here that of the engine whose core plays a script (`tests/contracts/core.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import kvhook
from kvhook import VLLMMetricsCollector
from kvhook.analysis.autopsy import examine
from tests.contracts.behaviour import ENGINE, make_engine
from tests.contracts.core import Prompt, Said, Sent, add
from tests.contracts.core_engines import engines_of
from tests.contracts.loader import stubs
from tests.ring.synthetic import Recording
from tests.watched import watched

SYNC = f"{ENGINE}:LLMEngine"
STOPS, RUNS_ON = Prompt(computed=10, stop_after=2), Prompt(computed=10)

#: the prompts, what the core sends, and how many are left in the front end's queue
CASES: dict[str, tuple[dict[str, Prompt], list[Sent], int]] = {
    "all stop in the last step": (
        dict.fromkeys("abcd", STOPS),
        [Sent(tuple(map(Said, "abcd")), running=4), Sent(tuple(map(Said, "abcd")), running=4)],
        0,
    ),
    "one of three stops, two run on": (
        {"a": STOPS, "b": RUNS_ON, "c": RUNS_ON},
        [Sent(tuple(map(Said, "abc")), running=3), Sent(tuple(map(Said, "abc")), running=3)],
        2,
    ),
    "the scheduler has heard of the first and not of the second": (
        {"a": STOPS, "b": Prompt(computed=10, stop_after=3), "c": RUNS_ON},
        [
            Sent(tuple(map(Said, "abc")), running=3),
            Sent(tuple(map(Said, "abc")), running=3),
            Sent(tuple(map(Said, "bc")), running=2),
        ],
        1,
    ),
    "a token in the core ends one that the scheduler does not count": (
        {"a": RUNS_ON, "b": RUNS_ON},
        [Sent((Said("a"), Said("b")), running=2), Sent((Said("a", finished=True), Said("b")), running=1)],
        1,
    ),
}


@pytest.mark.parametrize("level", ["full", "light"])
@pytest.mark.parametrize("release", ["0.9.2", "0.26.0", "0.32.0"])
@pytest.mark.parametrize("case", CASES)
def test_every_place_tells_what_the_front_end_has(fresh: Path, case: str, release: str, level: str):
    prompts, sent, left = CASES[case]
    with stubs(engines_of(release)), kvhook.install(ring_slots=64, level=level, ring_dir=fresh) as session:
        engine = make_engine(SYNC, log_stats=False)
        collector = VLLMMetricsCollector(engine)
        for name, prompt in prompts.items():
            add(engine, name, prompt)
        engine.engine_core.plan += sent
        for _ in sent:
            engine.step()
        assert len(engine.output_processor.request_states) == left, "the script is not what the case says"
        summary = session.summary()
        found: dict[str, Any] = {
            "summary": summary.num_reqs_at_end,
            "JSON": summary.as_dict()["num_reqs_at_end"],
            "trace": session.trace().summary().num_reqs_at_end,
            "autopsy": examine(session.trace(), "alive").still_running,
            "collector": collector.get_comprehensive_stats()["key_metrics"]["requests_running"],
        }
        tops = [view.running for view in watched(session.rings[0].parent)]
        assert session.faults == {}
    assert found == dict.fromkeys(found, left)
    # while some are left, the screen shows what vLLM says: its scheduler's last state
    assert tops == [left and sent[-1].running]
    assert ("still in the queue" in str(summary)) == bool(left)
    (queue,) = [account for account in summary.accounts if account.name == "requests"]
    assert queue.ok
    assert (queue.left, queue.right) == (len(prompts), len(prompts) - left + (sent[-1].running or 0))


def test_numbers_of_the_tokens_are_not_excused_by_requests_that_are_gone(tmp_path: Path):
    """One request, that stopped: no request is left whose tokens could explain hits that nobody got."""
    recording = Recording(tmp_path)
    recording.step(num_running_reqs=1, num_added_reqs=1, prefix_cache_hits=16, num_generation_tokens=1)
    recording.finish(0, finish_reason=0, num_prompt_tokens=20, num_cached_tokens=0, num_generation_tokens=2)
    recording.step(num_running_reqs=1, num_finished_reqs=1, num_generation_tokens=1)
    accounts = {account.name: account for account in kvhook.open(recording.path).summary().accounts}
    hits = accounts["cached tokens"]
    assert (hits.left, hits.right, hits.explained_by, hits.ok) == (16, 0, "", False)


def test_a_request_whose_end_is_not_known_is_left_even_if_others_stopped(tmp_path: Path):
    recording = Recording(tmp_path)
    recording.step(num_running_reqs=2, num_waiting_reqs=1, num_added_reqs=3)
    recording.finish(0, finish_reason=0)
    recording.step(num_running_reqs=2, num_waiting_reqs=1, num_finished_reqs=1)
    summary = kvhook.open(recording.path).summary()
    assert summary.num_reqs_at_end == 2
    assert "2 requests were still in the queue after the last step" in str(summary)
    autopsy = examine(kvhook.open(recording.path), "killed")
    assert (autopsy.still_running, autopsy.still_waiting) == (1, 1)
