"""The table of fields."""

from __future__ import annotations

from pathlib import Path

import pytest

import kvhook
from kvhook import schema
from kvhook.adapters import ADAPTERS
from kvhook.facts import clean_facts
from kvhook.schema import FACT_FIELDS, KINDS, REQUEST_FIELDS, RUN_FIELDS, STEP_FIELDS, FactField, Field, blank, stored
from tests.standin import fake_vllm, step_stats

DATA = Path(__file__).parent / "data"

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


# Facts


@pytest.mark.parametrize("fields", [FACT_FIELDS, RUN_FIELDS], ids=["engine", "run"])
def test_every_fact_has_one_name_a_type_and_a_meaning(fields: tuple[FactField, ...]):
    names = [f.name for f in fields]
    assert len(names) == len(set(names))
    for field in fields:
        assert field.type in ("text", "i8", "f8", "count", "flag", "texts", "reasons", "list"), field.name
        assert field.meaning, field.name


def test_every_fact_of_a_session_is_in_the_table(fresh: Path):
    with fake_vllm() as vllm:
        session = kvhook.install(max_overhead=0.5)
        engine = vllm.engine()
        assert set(session.meta) == {f.name for f in RUN_FIELDS}
        engine.plan.append(step_stats(generated=1))
        engine.step()
        meta = session.meta
    (facts,) = meta["engines"]
    assert set(facts) <= {f.name for f in FACT_FIELDS}
    assert set(meta) == {f.name for f in RUN_FIELDS} - {"why_no_steps"}
    assert clean_facts(facts) == facts


@pytest.mark.parametrize("path", sorted(DATA.glob("*.kvh")), ids=lambda path: path.stem)
def test_every_fact_of_a_recorded_run_is_in_the_table(path: Path):
    for facts in kvhook.open(path).meta["engines"]:
        assert set(facts) <= {f.name for f in FACT_FIELDS}


def test_every_fact_that_an_adapter_asks_for_is_in_the_table():
    asked = {name for adapter in ADAPTERS for name in (*adapter.facts, *adapter.asks)}
    assert asked <= {f.name for f in FACT_FIELDS}


@pytest.mark.parametrize("field", FACT_FIELDS, ids=lambda field: field.name)
def test_a_fact_of_another_type_is_not_believed(field: FactField):
    right = {"text": "x", "i8": 3, "f8": 0.5, "count": 3, "flag": True, "texts": {"a": "b"}, "reasons": {}, "list": []}
    assert clean_facts({field.name: right[field.type]}) == {field.name: right[field.type]}
    wrong = {"text": 1, "i8": "3", "f8": "0.5", "count": None, "flag": 1, "texts": {"a": 1}, "list": 1}
    refused: dict[str, object] = {"absent": {}} if field.type == "reasons" else {}
    assert clean_facts({field.name: wrong.get(field.type, 7)}) == refused
