"""Lines of the summary that appear only if there is something to say, over records made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvhook
from kvhook.text.summary import PrintedSummary
from tests.ring.synthetic import Recording


def summary(*recordings: Recording) -> PrintedSummary:
    return kvhook.open(*(r.path for r in recordings)).summary()


def says(text: str, s: PrintedSummary) -> bool:
    return text in " ".join(str(s).split())


@pytest.fixture
def plain(tmp_path: Path) -> PrintedSummary:
    """A run in which nothing special happened."""
    recording = Recording(tmp_path / "plain")
    recording.step(num_added_reqs=4)
    return summary(recording.run(4))


@pytest.mark.parametrize(
    "word",
    [
        *("engines", "speculative", "pooling", "multi-modal", "KV connector", "LoRA", "reset", "samples", "looked up"),
        *("missed", "inside a step", "no times", "NOT BALANCED", "groups", "aborted", "in the queue before"),
    ],
)
def test_a_plain_run_has_none_of_these_lines(plain: PrintedSummary, word: str):
    assert word not in str(plain)


# States


def test_complete_steps_are_those_in_which_every_state_is_known(tmp_path: Path):
    recording = Recording(tmp_path)
    recording.step(0.5)
    recording.step(float("nan"), has_scheduler_stats=0, num_running_reqs=-1, num_waiting_reqs=-1)
    recording.step(0.25)
    trace = kvhook.open(recording.path)
    assert np.isnan(trace.steps()["kv_cache_usage"].max())
    assert trace.steps(complete=True)["kv_cache_usage"].max() == 0.5
    assert trace.steps(complete=True)["step"].tolist() == [0, 2]
    assert len(trace.steps(0, complete=True)) == 2


def test_records_without_times_are_left_out_of_step_times(tmp_path: Path):
    recording = Recording(tmp_path, steps_without_times="the engine has a step of its own")
    recording.step(took_ms=10)
    recording.step(took_ms=30)
    recording.step(took_ms=0)
    s = summary(recording)
    assert (s.steps, s.steps_without_times, s.step_time.count) == (3, 1, 2)
    assert s.step_time.mean == pytest.approx(0.020)
    assert says("left out here: 1 of the steps, which have no times", s)


def test_a_run_without_any_times_says_why(tmp_path: Path):
    recording = Recording(tmp_path, steps_without_times="the engine has a step of its own")
    recording.step(took_ms=0)
    assert says("step time not known: the engine has a step of its own", summary(recording))


def test_a_record_that_came_long_after_the_last_step_does_not_make_the_run_longer(tmp_path: Path):
    recording = Recording(tmp_path)
    recording.step(took_ms=10)
    late = recording.clock + 60_000_000_000
    recording.step(float("nan"), t_start_ns=late, t_end_ns=late, has_scheduler_stats=0)
    assert summary(recording).wall_time == pytest.approx(0.010)


def test_the_peak_inside_a_step_stands_beside_that_at_the_ends(tmp_path: Path):
    recording = Recording(tmp_path)
    recording.step(0.312, kv_cache_usage_peak=0.453)
    s = summary(recording)
    assert (s.kv_cache_usage_peak, s.kv_cache_usage_peak_in_step) == (0.312, 0.453)
    assert says("peak 31.2 % (45.3 % inside a step), p95", s)


GONE = {"num_running_reqs": 0, "num_generation_tokens": 0, "num_prompt_tokens": 50, "num_finished_reqs": 1}


def test_a_usage_that_could_not_be_seen_is_not_known(tmp_path: Path):
    recording = Recording(tmp_path)
    recording.step(0.0, num_added_reqs=1, **GONE)
    s = summary(recording)
    assert s.kv_cache_usage_peak is s.kv_cache_usage_mean is None
    assert "kv_cache_usage_peak" in s.not_recorded
    assert says("KV cache not known: every request gave its blocks back before its step ended", s)
    assert "0.0 %" not in str(s).split("prefix cache")[0]


def test_what_is_used_inside_a_step_only_is_told_as_that(tmp_path: Path):
    recording = Recording(tmp_path)
    recording.step(0.0, num_added_reqs=1, kv_cache_usage_peak=0.2, **GONE)
    assert says("KV cache peak 20.0 % inside a step, 0.0 % at the end of each of 100 blocks", summary(recording))


def test_an_idle_cache_is_empty_and_not_unknown(tmp_path: Path):
    recording = Recording(tmp_path)
    recording.step(0.0, num_running_reqs=0, num_generation_tokens=0)
    assert says("KV cache peak 0.0 %", summary(recording))


def test_a_hybrid_models_cache_is_told_as_vllm_tells_it(tmp_path: Path):
    hybrid = {"num_kv_blocks": 256, "block_size": 32, "num_kv_cache_groups": 2, "kv_cache_size_tokens": 4048}
    s = summary(Recording(tmp_path, **hybrid).run(1))
    assert says("256 blocks shared by 2 groups, 4,048 tokens", s)
    assert "blocks of 32 tokens" not in str(s)
    plain = hybrid | {"num_kv_cache_groups": 1}
    assert says("of 256 blocks of 32 tokens", summary(Recording(tmp_path / "plain", **plain).run(1)))


# Several engines


def engines(tmp_path: Path, *begins_ms: int, **facts: Any) -> PrintedSummary:
    """Engines of four steps of 10 ms each, that begin at these times."""
    recordings = []
    for n, begin in enumerate(begins_ms):
        one = Recording(tmp_path / str(n), num_kv_blocks=256, **facts)
        one.clock = 10**12 + begin * 1_000_000
        for i in range(4):
            one.step(0.1 * (n + i), num_running_reqs=n + 1)
        recordings.append(one)
    return summary(*recordings)


def test_engines_that_lived_one_after_the_other_are_not_added_up(tmp_path: Path):
    s = engines(tmp_path, 0, 50, 100)
    assert s.num_kv_blocks == 256
    assert [life.overlaps for life in s.engine_lives] == [False] * 3
    assert says("engines 3, one after the other: their blocks do not add up", s)
    assert says("of 256 blocks of 16 tokens in each engine", s)
    assert says("engine 1: 4 steps, 256 blocks, peak 40.0 %, running at most 2", s)
    assert "768" not in str(s)
    assert s.num_running_reqs_peak == 3


def test_engines_that_lived_at_the_same_time_are_added_up_and_that_is_said(tmp_path: Path):
    s = engines(tmp_path, 0, 5)
    assert s.num_kv_blocks == 512
    assert says("engines 2 at the same time: 512 blocks at one time", s)


def test_of_engines_some_of_which_overlap_the_most_at_one_time_counts(tmp_path: Path):
    s = engines(tmp_path, 0, 5, 100)
    assert s.num_kv_blocks == 512
    assert [life.overlaps for life in s.engine_lives] == [True, True, False]
    assert says("engines 2 of 3 at the same time: 512 blocks at one time", s)


def test_many_engines_are_listed_up_to_a_limit(tmp_path: Path):
    s = engines(tmp_path, *range(0, 500, 50))
    assert len(s.engine_lives) == 10
    assert says("and 2 more", s)


# Look-ups


def test_look_ups_that_vllms_own_counters_missed(tmp_path: Path):
    def run(folder: str, **facts: Any) -> PrintedSummary:
        recording = Recording(tmp_path / folder, **facts)
        recording.step(scheduler_stats_logged=1, prefix_cache_queries=201, prefix_cache_hits=192)
        recording.step(scheduler_stats_logged=0, prefix_cache_queries=552, prefix_cache_hits=192)
        recording.step(scheduler_stats_logged=0)
        return summary(recording)

    on = run("on", stats_on=True)
    assert on.missed_by_vllm == (1, 552, 192)
    assert says("vLLM's own counters missed 552 look-ups, 192 hits", on)
    off = run("off", stats_on=False)
    assert off.missed_by_vllm is None
    assert "missed" not in str(off)


def test_hits_of_samples_are_told_from_hits_across_prompts(tmp_path: Path):
    recording = Recording(tmp_path)
    # a prompt of four samples that finds 32 tokens of an earlier one, and another one of two that finds nothing
    for request_id, cached in ((0, [32, 96, 96, 96]), (1, [0, 64]), (2, [48])):
        for sample, tokens in enumerate(cached):
            recording.finish(request_id, sample_index=sample, num_cached_tokens=tokens)
    recording.step(prefix_cache_queries=700, prefix_cache_hits=432)
    s = summary(recording)
    # 4 x 32 and 48 need no sibling
    assert s.sibling_hits == (2, 3 * 64 + 64, 4 * 32 + 48)
    assert says("256 cached tokens come from samples of the same prompt, 176 from other prompts", s)
    assert s.as_dict()["sibling_hits"] == {"prompts": 2, "siblings": 256, "others": 176}


def test_an_id_that_is_used_again_makes_no_siblings(tmp_path: Path):
    recording = Recording(tmp_path)
    for sample, tokens in ((0, 0), (1, 64), (0, 64), (1, 64)):
        recording.finish(5, sample_index=sample, num_cached_tokens=tokens)
    recording.step()
    assert summary(recording).sibling_hits == (2, 64, 128)


def prefilled(tmp_path: Path, vllm: str, queries: int, waiting: int = 0) -> PrintedSummary:
    """Three requests of 100 prompt tokens, so many of which were looked up; some of the requests waited."""
    recording = Recording(tmp_path, vllm=vllm)
    recording.step(
        num_running_reqs=3 - waiting,
        num_waiting_reqs=waiting,
        num_added_reqs=3,
        num_prompt_tokens=300,
        prefix_cache_queries=queries,
    )
    for n in range(3):
        recording.finish(n, num_prompt_tokens=100)
    recording.step(0.0, num_running_reqs=0, num_finished_reqs=3)
    return summary(recording)


@pytest.mark.parametrize(
    ("vllm", "waiting", "said"),
    [
        ("0.32.0", 0, "200 of 300 prompt tokens were never looked up"),
        ("0.32.0", 2, "200 of 300 prompt tokens were never looked up"),
        ("0.26.0", 0, "200 of 300 prompt tokens were never looked up"),
        ("0.26.0", 2, "at least 200 of 300 prompt tokens were never looked up"),
    ],
)
def test_prompts_that_were_never_looked_up(tmp_path: Path, vllm: str, waiting: int, said: str):
    s = prefilled(tmp_path, vllm, 100, waiting)
    assert s.never_looked_up == (200, 300, not said.startswith("at least"))
    assert says(said, s)
    assert ("at least" in str(s)) == said.startswith("at least")


def test_blocks_that_a_release_counts_instead_of_tokens_are_no_prompts_without_a_look_up(tmp_path: Path):
    assert prefilled(tmp_path, "0.8.5", 288).never_looked_up is None


@pytest.mark.parametrize(("vllm", "again"), [("0.26.0", 150), ("0.11.0", 150), ("0.8.3", 150), ("0.27.0", 0)])
def test_look_ups_that_were_repeated(tmp_path: Path, vllm: str, again: int):
    s = prefilled(tmp_path, vllm, 450, waiting=1)
    assert s.prefix_cache_repeated_queries == again
    assert says("at least 150 tokens were looked up again", s) == bool(again)
    assert says("or is re-admitted", s) == (vllm == "0.11.0")


def test_resets_of_the_prefix_cache(tmp_path: Path):
    recording = Recording(tmp_path)
    recording.step(prefix_cache_reset=1)
    assert says("reset once", summary(recording))
    recording.step(prefix_cache_reset=1)
    assert says("reset 2 times", summary(recording))


def test_local_connector_and_combined_hit_rate_are_apart(tmp_path: Path):
    recording = Recording(tmp_path)
    recording.step(
        prefix_cache_queries=200,
        prefix_cache_hits=80,
        connector_prefix_cache_queries=120,
        connector_prefix_cache_hits=30,
    )
    s = summary(recording)
    rates = s.prefix_cache_hit_rate, s.connector_prefix_cache_hit_rate, s.combined_prefix_cache_hit_rate
    assert rates == (0.4, 0.25, 0.55)
    assert says("hit rate 40.0 % of this run: 80 of 200 tokens", s)
    assert says("KV connector hit rate 25.0 %: 30 of 120 tokens", s)
    assert says("with the prefix cache 55.0 %: 110 of 200 tokens", s)


def test_the_multi_modal_cache(tmp_path: Path):
    recording = Recording(tmp_path, absent={"step": {}, "request": {}})
    recording.step(mm_cache_queries=8, mm_cache_hits=6)
    assert says("multi-modal hit rate 75.0 % of the processor cache: 6 of 8 items", summary(recording))


# What the engine does


def test_speculative_decoding(tmp_path: Path):
    recording = Recording(tmp_path)
    recording.step(num_drafts=10, num_draft_tokens=30, num_accepted_tokens=20)
    recording.step(num_drafts=10, num_draft_tokens=30, num_accepted_tokens=25)
    s = summary(recording)
    assert (s.num_draft_tokens, s.num_accepted_tokens) == (60, 45)
    assert (s.draft_acceptance_rate, s.mean_acceptance_length) == (0.75, 3.25)
    assert says("speculative 60 tokens in 20 drafts, 45 accepted (75.0 %), mean acceptance length 3.25", s)


@pytest.mark.parametrize("runner_type", ["pooling", None])
def test_pooling_models_have_no_lines_that_mean_nothing(tmp_path: Path, runner_type: str | None):
    recording = Recording(tmp_path, runner_type=runner_type)
    recording.finish(0, num_prompt_tokens=50, num_generation_tokens=0, e2e_latency=0.5)
    recording.step(0.0, num_added_reqs=1, num_prompt_tokens_computed=50, **GONE)
    s = summary(recording)
    assert s.pooling
    assert says("pooling no tokens are generated", s)
    for word in ("generated  ", "inter-token", "per out. token", "first token", "running", "waiting"):
        assert word not in str(s)
    assert "end to end" in str(s)
    assert all(account.ok for account in s.accounts)


def test_a_generating_model_that_has_generated_nothing_yet_is_no_pooling_model(tmp_path: Path):
    recording = Recording(tmp_path, runner_type="generate")
    recording.step(0.0, num_added_reqs=1, **GONE)
    assert not summary(recording).pooling


def test_lora_is_told_where_it_is_on(tmp_path: Path):
    assert says("LoRA on, at most 4 adapters in a batch", summary(Recording(tmp_path, max_loras=4).run(1)))


def test_aborts_are_told_where_there_are_no_single_requests(tmp_path: Path):
    recording = Recording(tmp_path)
    recording.step(level=1, num_added_reqs=6, num_running_reqs=2)
    recording.step(0.0, level=1, num_running_reqs=0, num_finished_reqs=6, num_aborted_reqs=2)
    assert says("finished 6 requests (2 of them aborted)", summary(recording))


def test_no_line_is_too_long(tmp_path: Path):
    recording = Recording(tmp_path, vllm="0.26.0", stats_on=True, num_kv_cache_groups=2, kv_cache_size_tokens=4048)
    recording.step(
        num_running_reqs=3,
        num_added_reqs=3,
        num_prompt_tokens=300_000,
        prefix_cache_queries=400_000,
        prefix_cache_hits=100_000,
        num_drafts=10_000,
        num_draft_tokens=30_000,
        num_accepted_tokens=20_000,
        kv_cache_usage_peak=1.0,
        connector_prefix_cache_queries=100_000,
        connector_prefix_cache_hits=10_000,
    )
    for sample in range(4):
        recording.finish(1, sample_index=sample, num_cached_tokens=10_000 * sample)
    recording.step(0.0, num_running_reqs=0, num_finished_reqs=3)
    text = str(summary(recording))
    assert max(map(len, text.splitlines())) <= 115, text
