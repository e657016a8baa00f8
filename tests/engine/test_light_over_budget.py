"""Stepping down on a real engine, over a budget that nothing can keep to: what is counted, and what the user sees."""

from __future__ import annotations

import itertools
import json
from typing import Any, NamedTuple

import numpy as np
import pytest

from kvhook.recording import budget as cost
from tests.engine.conftest import MakeLLM, Recorded, record
from tests.workloads import Seen

pytestmark = pytest.mark.usefixtures("nothing_installed")


class Down(NamedTuple):
    """The workload over a budget that nothing can keep to, with short windows."""

    recorded: Recorded
    text: str


#: 24 samples, one in eight steps, before the first change, and as many between two.
WINDOW = 8


@pytest.fixture(scope="module", params=["stats_off", "stats_on"])
def down(request: pytest.FixtureRequest, make_llm: MakeLLM) -> Down:
    options = {} if request.param == "stats_off" else {"disable_log_stats": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "WINDOW", WINDOW)
        patch.setattr(cost, "WINDOWS", 1)
        recorded = record(make_llm, {"max_overhead": 1e-9}, **options)
        return Down(recorded, str(recorded.session.summary()))


def levels(down: Down) -> list[dict[str, Any]]:
    (engine,) = down.recorded.session.meta["engines"]
    told: list[dict[str, Any]] = engine["levels"]
    return told


def test_down_it_goes_rung_by_rung_and_the_trace_says_when(down: Down):
    told = levels(down)
    rungs = [("light", 1), ("sparse", 4), ("sparse", 16), ("sparse", 64)]
    assert [(c["level"], c.get("every", 1)) for c in told] == [("full", 1), *rungs]
    # samples are taken in steps 0, 8, 16...
    assert [c["step"] for c in told] == [0, *(8 * (WINDOW * i - 1) + 1 for i in (1, 2, 3, 4))]
    steps = down.recorded.steps
    assert steps["step"].tolist() == list(range(len(down.recorded.seen.steps)))
    codes = {"full": 0, "light": 1, "sparse": 2}
    for change, after in itertools.zip_longest(told, told[1:]):
        part = steps["level"][change["step"] : after and after["step"]]
        assert set(part.tolist()) == {codes[change["level"]]}
    assert down.recorded.session.faults == {}


def test_down_outputs_and_blocks_are_the_same(down: Down, bare: Seen):
    assert down.recorded.seen.token_ids == bare.token_ids
    assert [s.blocks_in_use for s in down.recorded.seen.steps] == [s.blocks_in_use for s in bare.steps]


def test_down_usage_is_known_of_every_step(down: Down):
    held = np.array([step.blocks_in_use for step in down.recorded.seen.steps])
    with_stats = down.recorded.steps["has_scheduler_stats"] == 1
    assert with_stats.sum() > 0.9 * len(held)
    assert down.recorded.steps["num_kv_blocks_used"][with_stats].tolist() == held[with_stats].tolist()


def test_down_what_is_counted_is_what_the_scheduler_gave_out(down: Down):
    steps, gave = down.recorded.steps, np.array([step.tokens for step in down.recorded.seen.steps])
    counted = steps["has_iteration_stats"] == 1
    assert steps["num_generation_tokens"][counted].tolist() == gave[counted].tolist()
    # at full and light all that there was, at sparse one in so many steps
    whole = steps["level"] < 2
    assert steps["num_generation_tokens"][whole].sum() == gave[whole].sum()
    for change, after in itertools.zip_longest(levels(down)[2:], levels(down)[3:]):
        begin, end = change["step"], after["step"] if after else len(steps)
        expected = [gave[i] if not (i - begin) % change["every"] else 0 for i in range(begin, end)]
        assert steps["num_generation_tokens"][begin:end].tolist() == expected


def test_down_totals_of_tokens_are_not_known_and_the_summary_says_why(down: Down):
    s = down.recorded.summary
    assert s.num_generation_tokens is s.num_prompt_tokens is s.num_preempted_reqs is s.num_finished_reqs is None
    assert "to stay within max_overhead" in s.not_recorded["num_generation_tokens"]
    assert "tokens are not known" in down.text
    assert f"step {levels(down)[1]['step']}: light, because kvhook took" in down.text
    json.dumps(s.as_dict())


def test_down_what_the_user_has_stays_as_it_is(down: Down, bare: Seen, bare_default: Seen):
    seen = down.recorded.seen
    (engine,) = down.recorded.session.meta["engines"]
    without = bare if engine["stats_on"] else bare_default
    assert (
        seen.error_of_get_metrics == "" if engine["stats_on"] else "Stat logging disabled" in seen.error_of_get_metrics
    )
    if engine["stats_on"]:
        assert seen.counters == without.counters
        assert seen.loggers == without.loggers
    else:
        assert not any("Avg prompt throughput" in line for line in seen.log)
        # requests that began after the change carry no metrics, as without kvhook
        assert seen.outputs[-1].metrics is None


def test_down_the_cost_of_vllms_part_was_measured_where_it_was_for_kvhook(down: Down):
    (engine,) = down.recorded.session.meta["engines"]
    s = down.recorded.summary
    if engine["stats_on"]:
        assert s.vllm_stats_ns_p50 is None
    else:
        assert s.vllm_stats_ns_p50 is not None
        assert s.vllm_stats_ns_p50 > 0
