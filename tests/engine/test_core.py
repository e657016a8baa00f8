"""The engine core's own account on a real engine: against vLLM's outputs and counters, and the front end's account."""

from __future__ import annotations

import numpy as np

from kvhook.analysis.join import core_step_of
from tests.engine.conftest import Recorded


def test_the_core_is_recorded(stats_on: Recorded):
    cores = stats_on.session.cores()
    assert cores.why_none == ""
    assert cores.lost == 0
    assert len(cores) == 1


def test_front_end_and_core_are_joined_by_number_and_say_the_same(stats_on: Recorded):
    steps, core_steps = stats_on.steps, stats_on.session.core_steps()
    joined = core_step_of(steps, core_steps)
    assert (joined >= 0).sum() == (steps["has_scheduler_stats"] == 1).sum() == (core_steps["stats_number"] >= 0).sum()
    front, core = steps[joined >= 0], core_steps[joined[joined >= 0]]
    assert (front["num_kv_blocks_used"] == core["num_kv_blocks_used"]).all()
    # the front end's step encloses the core's, which lives in this process
    assert (front["t_start_ns"] <= core["t_schedule_ns"]).all()
    assert (core["t_end_ns"] <= front["t_end_ns"]).all()


def test_preemptions_and_cached_tokens_are_what_vllm_says(stats_on: Recorded):
    preemptions, lookups = stats_on.session.preemptions(), stats_on.session.lookups()
    assert len(preemptions) == stats_on.seen.counters["vllm:num_preemptions"] > 0
    first = lookups[lookups["resumed"] == 0]
    cached = sum(output.num_cached_tokens or 0 for output in stats_on.seen.outputs)
    assert first["num_found_tokens"].sum() == cached > 0


def test_every_request_has_a_life(stats_on: Recorded):
    lives = stats_on.session.core_requests()
    outputs = {int(o.request_id): o for o in stats_on.seen.outputs}
    assert sorted(lives["request_id"].tolist()) == sorted(outputs)
    for life in lives:
        output = outputs[int(life["request_id"])]
        assert life["num_prompt_tokens"] == len(output.prompt_token_ids)
        assert life["num_generation_tokens"] == len(output.outputs[0].token_ids)
        assert life["finish_reason"] == output.outputs[0].finish_reason
        assert life["t_arrived_ns"] <= life["t_first_scheduled_ns"] < life["t_first_token_ns"] <= life["t_finished_ns"]
    needed = sum(len(o.prompt_token_ids) + len(o.outputs[0].token_ids) - 1 for o in stats_on.seen.outputs)
    core = stats_on.session.core_steps()
    done = core["num_prefill_tokens"].sum() + core["num_decode_tokens"].sum() + lives["num_cached_tokens"].sum()
    assert done == needed
    assert core["num_recomputed_tokens"].sum() == lives["num_recomputed_tokens"].sum() > 0
    assert (np.diff(core["t_schedule_ns"]) > 0).all()
