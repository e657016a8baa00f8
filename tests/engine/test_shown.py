"""What the summary shows of runs on a real engine that are not plain: samples, prompts that are not looked up, aborts,
requests left over, drafts, pooling, and several engines in a row. Expected numbers come from block arithmetic, from
what was sent, and from vLLM's outputs."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import pytest

import kvhook
from kvhook.adapters.table import release, vllm_version
from kvhook.demo.model import LAYERS
from kvhook.window import Window, position
from tests.engine.conftest import MakeLLM
from tests.workloads import BLOCK_SIZE, USABLE, tokens

# of the n-gram drafter
pytestmark = pytest.mark.filterwarnings("ignore:.*reflected list.*")

SAMPLES, PROMPT = 4, 100
#: Whole blocks of a prompt, but never its last token.
CACHED = BLOCK_SIZE * ((PROMPT - 1) // BLOCK_SIZE)


class Shown(NamedTuple):
    """Summaries of four engines in a row, and what vLLM returned."""

    samples: Any
    left_over: Any
    after: Any
    drafts: Any
    drafted: list[Any]
    pooled: Any
    hybrid: Any
    capacity: int
    together: Any
    meta: Any
    requests: Any


@pytest.fixture(scope="module")
def shown(make_llm: MakeLLM) -> Shown:
    from vllm import SamplingParams  # type: ignore[import-not-found, unused-ignore]

    if release(vllm_version()) < (0, 32, 0):
        pytest.skip("the options are those of 0.32")
    rng = random.Random(9)

    def send(llm: Any, prompts: list[list[int]], **sampling: Any) -> list[Any]:
        params = SamplingParams(ignore_eos=True, seed=3, **sampling)
        return list(llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False))

    kvhook.uninstall()
    with kvhook.install() as session:
        llm = make_llm()
        send(llm, [tokens(rng, PROMPT)], n=SAMPLES, max_tokens=5)
        send(llm, [tokens(rng, PROMPT) for _ in range(2)], prompt_logprobs=1, max_tokens=3)
        samples = session.summary()

        engine = llm.llm_engine
        for name in ("901", "902", "903"):
            params = SamplingParams(ignore_eos=True, max_tokens=6)
            engine.add_request(name, {"prompt_token_ids": tokens(rng, 40)}, params)
        engine.step()
        engine.abort_request(["902"])
        left_over = session.summary()
        before = position(session.trace())
        send(llm, [tokens(rng, 30)], max_tokens=12)
        after = Window(session.trace(), before).summary()
        requests = session.requests()
        del llm, engine

        speculative = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
        llm = make_llm(speculative_config=speculative)
        drafted = send(llm, [tokens(rng, 10) * 6 for _ in range(3)], max_tokens=24, temperature=0)
        drafts = session.summary(1)
        del llm

        llm = make_llm(runner="pooling")
        llm.embed([{"prompt_token_ids": tokens(rng, 2 * BLOCK_SIZE)} for _ in range(5)], use_tqdm=False)
        pooled = session.summary(2)
        del llm

        kinds = ["full_attention", "sliding_attention"]
        layers = {"layer_types": [kinds[n % 2] for n in range(LAYERS)], "sliding_window": 2 * BLOCK_SIZE}
        llm = make_llm(hf_overrides=layers, max_model_len=512)
        send(llm, [tokens(rng, PROMPT)], max_tokens=3)
        hybrid, capacity = session.summary(3), llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
        del llm
        together, meta = session.summary(), session.meta
    return Shown(samples, left_over, after, drafts, drafted, pooled, hybrid, capacity, together, meta, requests)


def test_hits_of_samples_come_from_their_siblings(shown: Shown):
    s = shown.samples
    assert s.prefix_cache_hits == (SAMPLES - 1) * CACHED
    assert s.sibling_hits == (1, (SAMPLES - 1) * CACHED, 0)
    assert f"{(SAMPLES - 1) * CACHED} cached tokens come from samples of the same prompt, 0 from other" in str(s)


def test_prompts_with_logprobs_were_never_looked_up(shown: Shown):
    assert shown.samples.never_looked_up == (2 * PROMPT, (SAMPLES + 2) * PROMPT, True)
    assert "200 of 600 prompt tokens were never looked up" in str(shown.samples)


def test_requests_that_are_left_over_are_told_when_they_are_left_and_when_the_next_run_finds_them(shown: Shown):
    left, after = shown.left_over, shown.after
    assert (left.num_added_reqs, left.num_aborted_reqs, left.num_reqs_at_end) == (SAMPLES + 2 + 3, 1, 2)
    assert "2 requests were still in the queue after the last step" in str(left)
    assert (after.num_reqs_before, after.num_added_reqs, after.num_finished_reqs) == (2, 1, 3)
    assert "2 requests were in the queue before" in str(after)


def test_an_aborted_request_is_a_row_with_what_is_known_of_it(shown: Shown):
    (row,) = shown.requests[shown.requests["finish_reason"] == "abort"]
    assert (row["request_id"], row["num_prompt_tokens"], row["num_generation_tokens"]) == (902, 40, 1)


def test_drafts_are_told(shown: Shown):
    s = shown.drafts
    generated = sum(len(one.outputs[0].token_ids) for one in shown.drafted)
    assert s.num_generation_tokens == generated
    assert s.num_drafts > 0
    assert 0 <= s.num_accepted_tokens <= s.num_draft_tokens <= 3 * s.num_drafts
    assert s.mean_acceptance_length == 1 + s.num_accepted_tokens / s.num_drafts
    assert f"speculative     {s.num_draft_tokens} tokens in {s.num_drafts} drafts" in str(s)


def test_a_pooling_model_is_told_as_one_and_its_peak_is_seen_inside_its_step(shown: Shown):
    s = shown.pooled
    assert s.pooling
    assert s.num_finished_reqs == 5
    assert s.kv_cache_usage_peak == 0
    assert s.kv_cache_usage_peak_in_step == pytest.approx(5 * 2 / USABLE)
    text = str(s)
    assert "pooling         no tokens are generated" in text
    assert f"peak {100 * 10 / USABLE:.1f} % inside a step, 0.0 % at the end of each" in text
    assert "inter-token" not in text


def test_a_hybrid_models_cache_is_told_as_vllm_tells_it(shown: Shown):
    text = str(shown.hybrid)
    # a request needs a block of each group for its tokens
    assert shown.capacity < USABLE * BLOCK_SIZE
    assert f"{USABLE} blocks shared by 2 groups, {shown.capacity:,} tokens" in text
    assert f"blocks of {BLOCK_SIZE} tokens" not in text


def test_engines_in_a_row_are_not_added_up(shown: Shown):
    s = shown.together
    assert [(life.engine, life.num_kv_blocks, life.overlaps) for life in s.engine_lives] == [
        (n, USABLE, False) for n in range(4)
    ]
    assert s.num_kv_blocks == USABLE
    assert "engines         4, one after the other: their blocks do not add up" in str(s)


def test_every_account_balances_or_is_explained(shown: Shown):
    for summary in (shown.samples, shown.left_over, shown.after, shown.drafts, shown.pooled, shown.hybrid):
        assert summary.accounts
        assert [account for account in summary.accounts if not account.ok] == []
    assert all(account.difference == 0 for account in shown.samples.accounts)


def test_the_groups_of_layers_and_the_runner_are_known(shown: Shown):
    facts = shown.meta["engines"]
    assert [e["num_kv_cache_groups"] for e in facts] == [1, 1, 1, 2]
    assert [e["runner_type"] for e in facts] == ["generate", "generate", "pooling", "generate"]
    assert facts[0]["kv_cache_size_tokens"] == pytest.approx(USABLE * BLOCK_SIZE, rel=0.05)
