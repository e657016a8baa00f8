"""The table of fields."""

from __future__ import annotations

import pytest

from kvhook import schema
from kvhook.schema import KINDS, REQUEST_FIELDS, STEP_FIELDS, Field, blank, stored

# As promised to programs; only ever added to.
PROMISED_STEPS = (
    "step",
    "engine_index",
    "t_start_ns",
    "t_end_ns",
    "has_scheduler_stats",
    "num_running_reqs",
    "num_waiting_reqs",
    "num_skipped_waiting_reqs",
    "kv_cache_usage",
    "num_kv_blocks",
    "num_kv_blocks_used",
    "prefix_cache_requests",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "prefix_cache_preempted_requests",
    "prefix_cache_preempted_queries",
    "prefix_cache_preempted_hits",
    "prefix_cache_reset",
    "connector_prefix_cache_queries",
    "connector_prefix_cache_hits",
    "num_prompt_tokens",
    "num_prompt_tokens_computed",
    "num_prompt_tokens_cached",
    "num_generation_tokens",
    "num_preempted_reqs",
    "num_finished_reqs",
    "ttft_count",
    "ttft_sum",
    "ttft_max",
    "itl_count",
    "itl_sum",
    "itl_max",
    "num_drafts",
    "num_draft_tokens",
    "num_accepted_tokens",
    "mm_cache_queries",
    "mm_cache_hits",
    "num_evicted_blocks_sampled",
)
PROMISED_REQUESTS = (
    "request",
    "step",
    "finish_reason",
    "num_prompt_tokens",
    "num_generation_tokens",
    "num_cached_tokens",
    "queued_time",
    "prefill_time",
    "decode_time",
    "inference_time",
    "e2e_latency",
    "time_to_first_token",
    "mean_time_per_output_token",
    "num_preemptions",
)


@pytest.mark.parametrize(
    ("promised", "fields"), [(PROMISED_STEPS, STEP_FIELDS), (PROMISED_REQUESTS, REQUEST_FIELDS)], ids=["steps", "reqs"]
)
def test_promised_columns_are_there(promised: tuple[str, ...], fields: tuple[Field, ...]):
    assert set(promised) <= {f.name for f in fields}


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_unique(kind: str):
    names = [f.name for f in KINDS[kind][1]]
    assert len(names) == len(set(names))


def test_record_codes_are_unique():
    codes = [code for code, _ in KINDS.values()]
    assert len(codes) == len(set(codes))


@pytest.mark.parametrize("kind", KINDS)
def test_a_slot_holds_integers_first_then_floats(kind: str):
    types = ["f8" if f.type == "f8" else "i8" for f in stored(KINDS[kind][1])]
    assert types == sorted(types, reverse=True)
    assert sorted(stored(KINDS[kind][1])) == sorted(KINDS[kind][1])


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_says_what_it_means(kind: str):
    for field in KINDS[kind][1]:
        assert field.type in ("i8", "f8", "enum")
        assert field.role in (schema.ID, schema.TIME, schema.FLAG, schema.COUNTER, schema.GAUGE)
        assert field.meaning, field.name


def test_a_state_that_is_not_known_is_never_a_number_that_looks_like_one():
    for field in STEP_FIELDS:
        value = float(blank(field))
        if field.role == schema.GAUGE:
            assert value != value or value == -1, field.name
        else:
            assert value == 0, field.name
