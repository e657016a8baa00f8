"""The cases that the settings test draws: the same each time, and with everything in them that is to be tried."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.engine.settings import cases
from tests.engine.settings.cases import CASES, KINDS, LEVELS, MAX_MODEL_LEN, PER_ENGINE, Can, Case

DRAWN = [cases.case(seed, Can()) for seed in range(CASES)]


def asked(case: Case) -> list[cases.Ask]:
    return [ask for batch in case.batches for ask in batch.asks]


def test_a_seed_gives_the_same_case_each_time():
    assert [cases.case(seed, Can()) for seed in range(CASES)] == DRAWN


def test_seeds_that_share_an_engine_have_the_same_settings():
    for case in DRAWN:
        assert case.settings == DRAWN[case.seed // PER_ENGINE * PER_ENGINE].settings


def test_make_test_runs_every_kind_of_engine_and_every_level():
    engines = {case.settings.number: case.settings for case in DRAWN}.values()
    assert {one.kind for one in engines} == set(KINDS)
    assert {(one.level, one.stats_on) for one in engines} == set(LEVELS)
    chunked = {one.level for one in engines if one.options["max_num_batched_tokens"] < 200}
    assert chunked == {"full", "light"}


def test_make_matrix_runs_every_kind_at_every_level_with_stats_on_and_off():
    engines = {(s.kind, s.level, s.stats_on) for s in (cases.settings(n, Can()) for n in range(300 // PER_ENGINE))}
    assert engines == {(kind, level, on) for kind in KINDS for level, on in LEVELS}


FEATURES = {
    "a prompt longer than a chunk": lambda c: any(
        len(ask.prompt) > c.settings.options["max_num_batched_tokens"] for ask in asked(c)
    ),
    "a whole number of blocks": lambda c: any(
        len(ask.prompt) % c.settings.options["block_size"] == 0 for ask in asked(c)
    ),
    "the same prompt again": lambda c: Counter(tuple(ask.prompt) for ask in asked(c)).most_common(1)[0][1] > 1,
    "a prompt that goes on from an output": lambda c: any(ask.follows for ask in asked(c)),
    "several samples": lambda c: any(ask.sampling.get("n", 1) > 1 for ask in asked(c)),
    "a stop string": lambda c: any("stop" in ask.sampling for ask in asked(c)),
    "stop tokens": lambda c: any("stop_token_ids" in ask.sampling for ask in asked(c)),
    "prompt logprobs": lambda c: any("prompt_logprobs" in ask.sampling for ask in asked(c)),
    "one token": lambda c: any(ask.sampling.get("max_tokens") == 1 for ask in asked(c)),
    "an abort": lambda c: any(act.what == "abort" for batch in c.batches for act in batch.acts),
    "an abort of several samples": lambda c: any(
        act.what == "abort" and batch.asks[act.ask].sampling.get("n", 1) > 1
        for batch in c.batches
        for act in batch.acts
    ),
    "a reset before a batch": lambda c: any(act[:2] == (0, "reset") for batch in c.batches for act in batch.acts),
    "a reset within a batch": lambda c: any(
        act.step > 0 and act.what == "reset" for batch in c.batches for act in batch.acts
    ),
    "a reset that sends running requests back": lambda c: any(
        act.what == "reset with the running" for batch in c.batches for act in batch.acts
    ),
    "requests that arrive later": lambda c: any(ask.arrives for ask in asked(c)),
    "priorities": lambda c: len({ask.priority for ask in asked(c)}) > 1,
    "generate": lambda c: any(batch.through == "generate" for batch in c.batches),
    "step by step, outputs as they come": lambda c: any(batch.cumulative for batch in c.batches),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_make_test_tries(feature: str):
    assert sum(map(FEATURES[feature], DRAWN)) >= 2


def test_every_request_fits_into_the_model():
    for case in DRAWN:
        for ask in asked(case):
            # a follow-up has an earlier prompt of less than 250 tokens, and its output, before it
            before = 250 + 48 if ask.follows else 0
            assert before + len(ask.prompt) + ask.sampling.get("max_tokens", 0) < MAX_MODEL_LEN


def test_what_a_release_cannot_do_is_left_out_of_its_cases():
    without = Can(block_sizes=(32,), reset_running=False)
    for seed in range(CASES):
        case = cases.case(seed, without)
        assert case.settings.options["block_size"] == 32
        assert not any(act.what == "reset with the running" for batch in case.batches for act in batch.acts)


def test_seeds_can_be_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KVHOOK_SETTINGS_SEEDS", "17 40-43 3")
    assert cases.seeds() == [3, 17, 40, 41, 42, 43]
    monkeypatch.delenv("KVHOOK_SETTINGS_SEEDS")
    monkeypatch.setenv("KVHOOK_SETTINGS_CASES", "5")
    assert cases.seeds() == [0, 1, 2, 3, 4]


def test_the_text_of_a_case_says_how_to_run_it_again():
    assert "KVHOOK_SETTINGS_SEEDS=7 " in DRAWN[7].text
    assert "block_size=" in DRAWN[7].text
