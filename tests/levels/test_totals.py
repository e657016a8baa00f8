"""What summary and collector give of a run that is light or stepped down; a total that is not known has a reason."""

from __future__ import annotations

import json

import pytest

import kvhook
from kvhook import VLLMMetricsCollector
from kvhook.schema import COUNTED
from tests.contracts.core_engines import SYNC
from tests.contracts.light.script import begin, go
from tests.levels.stepped_down import CHANGES, STEPS, over_budget, script

pytestmark = pytest.mark.usefixtures("fresh")


# The summary


def test_a_light_run_says_that_it_is_one_and_what_it_lacks():
    with kvhook.install(level="light") as session:
        go(begin(SYNC, script=script(10)))
        s = session.summary()
    assert s.steps_by_level == {"light": 10}
    assert s.level_changes == []
    assert (s.num_generation_tokens, s.num_finished_reqs) == (sum(i + 2 for i in range(10)), 0)
    assert s.time_to_first_token.count == 0
    assert {"time_to_first_token", "inter_token_latency", "e2e_latency", "finished_by_reason"} <= s.not_recorded.keys()
    assert "num_generation_tokens" not in s.not_recorded
    text = str(s)
    assert "level           light: no latencies, no single requests" in text
    assert "latency         not recorded at level light: kvhook.install(level='full') does" in text
    assert "first token" not in text
    assert "generated       65 tokens" in text
    assert max(map(len, text.splitlines())) <= 100
    json.dumps(s.as_dict())


def test_a_full_run_says_nothing_of_levels():
    with kvhook.install() as session:
        go(begin(SYNC, script=script(10)))
        s = session.summary()
    assert (s.steps_by_level, s.level_changes, s.not_recorded) == ({"full": 10}, [], {})
    assert "level" not in str(s)


@pytest.mark.usefixtures("hasty")
def test_a_run_that_went_down_to_light_has_exact_tokens_and_the_latencies_of_its_full_steps():
    session, _ = over_budget(9)
    s = session.summary()
    assert s.steps_by_level == {"full": 1, "light": 8}
    assert s.num_generation_tokens == sum(i + 2 for i in range(9))
    assert s.num_prompt_tokens == 50
    assert s.time_to_first_token.count == 2
    assert "of 1 of 9 steps only" in s.not_recorded["time_to_first_token"]
    assert "num_generation_tokens" not in s.not_recorded
    text = str(s)
    assert "full in 1 steps, light in 8 steps" in text
    assert "latencies and single requests are those of the 1 steps at level full" in text
    assert "step 1: light, because kvhook took" in text
    assert "first token             2" in text


@pytest.mark.usefixtures("hasty")
def test_totals_of_a_run_that_was_counted_in_part_are_none_with_a_reason():
    session, _ = over_budget()
    s = session.summary()
    assert s.steps_by_level == {"full": 1, "light": 8, "sparse": 31}
    none = {*COUNTED, "prompt_tokens_per_second", "generation_tokens_per_second"}
    assert len(none & s.as_dict().keys()) == 8
    for name in none & s.as_dict().keys():
        assert getattr(s, name) is None, name
        assert "to stay within max_overhead" in s.not_recorded[name]
    assert s.num_running_reqs_peak == 2 + STEPS - 1
    assert [c["step"] for c in s.level_changes] == list(CHANGES)
    text = str(s)
    assert "tokens are not known: in some steps outputs were not counted" in text
    assert "prompt tokens   not known" in text
    assert "generated       not known" in text
    assert "preemptions     not known" in text
    assert "finished        not known" in text
    assert "step 25: sparse, because" in text
    plain = json.loads(json.dumps(s.as_dict()))
    assert plain["num_generation_tokens"] is None


# The collector


@pytest.mark.usefixtures("hasty")
def test_the_collector_gives_no_total_of_what_was_counted_in_part():
    session, engine = over_budget(13)
    got = VLLMMetricsCollector(engine).get_comprehensive_stats()
    for name in ("num_generation_tokens", "num_prompt_tokens", "num_preempted_reqs", "num_finished_reqs"):
        assert got["key_metrics"][name] is None, name
        assert "to stay within max_overhead" in got["absent"][name]
        assert got["summary"][name] is None
    assert got["key_metrics"]["num_running_reqs"] == 2 + 12
    assert "num_generation_tokens" not in session.meta["absent"]


@pytest.mark.usefixtures("hasty")
def test_the_collector_gives_totals_as_long_as_every_step_is_counted():
    # at sparse the first step is counted, and here it is the last
    _, engine = over_budget(10)
    got = VLLMMetricsCollector(engine).get_comprehensive_stats()
    assert got["key_metrics"]["num_generation_tokens"] == sum(i + 2 for i in range(10))
    assert got["key_metrics"]["num_prompt_tokens"] == 50
    assert got["summary"]["num_generation_tokens"] == sum(i + 2 for i in range(10))


def test_the_collector_at_level_light_has_tokens_and_no_latencies():
    with kvhook.install(level="light"):
        engine = begin(SYNC, script=script(10))
        go(engine)
        got = VLLMMetricsCollector(engine).get_comprehensive_stats()
    assert got["collection_method"] == "hook"
    assert got["key_metrics"]["num_generation_tokens"] == sum(i + 2 for i in range(10))
    assert got["key_metrics"]["num_prompt_tokens"] == 50
    assert not {"num_generation_tokens", "num_prompt_tokens"} & got["absent"].keys()
    assert got["histogram_analysis"]["avg_time_to_first_token_seconds"] is None
