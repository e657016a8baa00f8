"""The accounts of a run, over records made by hand: what balances, what explains a difference, what nothing does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import kvhook
from kvhook.analysis.accounts import Account
from kvhook.analysis.queue import queue_of
from kvhook.window import Window, position
from tests.ring.synthetic import Recording


def by_name(trace: kvhook.Trace) -> dict[str, Account]:
    return {account.name: account for account in trace.summary().accounts}


def of(recording: Recording) -> dict[str, Account]:
    return by_name(kvhook.open(recording.path))


def idle(**values: Any) -> dict[str, Any]:
    return {"num_running_reqs": 0, "num_waiting_reqs": 0, "num_generation_tokens": 0, "usage": 0.0, **values}


def two_requests(tmp_path: Path, **facts: Any) -> Recording:
    """Two requests of 40 and 60 prompt tokens: the second finds 32, both generate 3."""
    recording = Recording(tmp_path, **facts)
    recording.step(
        0.1,
        num_running_reqs=2,
        num_added_reqs=2,
        prefix_cache_queries=100,
        prefix_cache_hits=32,
        num_prompt_tokens=100,
        num_prompt_tokens_computed=68,
        num_prompt_tokens_cached=32,
        num_generation_tokens=2,
    )
    recording.step(0.1, num_running_reqs=2, num_generation_tokens=2)
    for prompt, cached in ((40, 0), (60, 32)):
        recording.finish(
            recording.requests, num_prompt_tokens=prompt, num_cached_tokens=cached, num_generation_tokens=3
        )
    recording.step(**idle(num_generation_tokens=2, num_finished_reqs=2))
    return recording


def test_a_whole_run_balances(tmp_path: Path):
    accounts = of(two_requests(tmp_path))
    sides = {name: (a.left, a.right, a.explained_by, a.ok) for name, a in accounts.items()}
    assert sides == {
        "cached tokens": (32, 32, "", True),
        "prompt tokens": (100, 100, "", True),
        "generated tokens": (6, 6, "", True),
        "requests": (2, 2, "", True),
        "blocks in use": (0, 0, "", True),
    }


def test_a_difference_that_nothing_explains_is_in_the_summary(tmp_path: Path):
    recording = two_requests(tmp_path)
    recording.step(**idle(prefix_cache_queries=50, prefix_cache_hits=48))
    account = of(recording)["cached tokens"]
    assert (account.left, account.right, account.difference, account.ok) == (80, 32, 48, False)
    text = str(kvhook.open(recording.path).summary())
    assert "NOT BALANCED    tokens found in look-ups: 80; cached tokens of requests: 32" in text
    assert "48 tokens more, which nothing in this run explains" in text


def test_balanced_accounts_have_no_line(tmp_path: Path):
    assert "NOT BALANCED" not in str(kvhook.open(two_requests(tmp_path).path).summary())


def test_a_request_that_still_runs_explains_hits_and_tokens(tmp_path: Path):
    recording = two_requests(tmp_path)
    recording.step(num_running_reqs=1, num_added_reqs=1, prefix_cache_hits=16, num_generation_tokens=1)
    accounts = of(recording)
    assert all(account.ok for account in accounts.values())
    assert accounts["cached tokens"].difference == 16
    assert accounts["generated tokens"].explained_by == "requests still run or wait"
    assert (accounts["requests"].left, accounts["requests"].right) == (3, 3)


def test_more_cached_tokens_than_were_found_are_not_explained_by_requests_that_still_run(tmp_path: Path):
    recording = two_requests(tmp_path)
    recording.finish(7, num_prompt_tokens=10, num_cached_tokens=16, num_generation_tokens=1)
    recording.step(num_running_reqs=1, num_added_reqs=2, num_finished_reqs=1, num_generation_tokens=1)
    account = of(recording)["cached tokens"]
    assert (account.difference, account.explained_by, account.ok) == (-16, "", False)


def test_a_request_that_vanishes_is_not_explained(tmp_path: Path):
    recording = Recording(tmp_path)
    recording.step(num_running_reqs=3, num_added_reqs=3)
    recording.finish(0, num_generation_tokens=1)
    recording.step(**idle(num_finished_reqs=1))
    account = of(recording)["requests"]
    assert (account.left, account.right, account.ok) == (3, 1, False)


def test_requests_that_were_in_the_queue_before_are_counted_and_told(tmp_path: Path):
    recording = Recording(tmp_path)
    recording.step(num_running_reqs=3, num_waiting_reqs=2, num_added_reqs=1)
    for n in range(5):
        recording.finish(n, num_prompt_tokens=30, num_generation_tokens=9)
    recording.step(**idle(num_finished_reqs=5))
    summary = kvhook.open(recording.path).summary()
    assert (summary.num_reqs_before, summary.num_added_reqs, summary.num_finished_reqs) == (4, 1, 5)
    assert summary.num_reqs_at_end == 0
    assert "4 requests were in the queue before" in str(summary)
    accounts = of(recording)
    assert accounts["requests"].ok
    assert accounts["prompt tokens"].explained_by == "requests were in the queue before"


def test_a_window_counts_what_was_there_when_it_began(tmp_path: Path):
    recording = Recording(tmp_path)
    recording.step(num_running_reqs=4, num_added_reqs=4)
    after = position(kvhook.open(recording.path))
    for n in range(5):
        recording.finish(n, finish_reason=1)
    recording.step(**idle(num_added_reqs=1, num_finished_reqs=5))
    window = Window(kvhook.open(recording.path), after).summary()
    assert (window.num_reqs_before, window.num_added_reqs, window.num_finished_reqs) == (4, 1, 5)
    whole = kvhook.open(recording.path).summary()
    assert (whole.num_reqs_before, whole.num_added_reqs, whole.num_finished_reqs) == (0, 5, 5)
    assert "in the queue before" not in str(whole)


def test_what_is_left_in_the_queue_is_told(tmp_path: Path):
    recording = Recording(tmp_path)
    recording.step(num_running_reqs=1, num_waiting_reqs=2, num_added_reqs=3)
    summary = kvhook.open(recording.path).summary()
    assert summary.num_reqs_at_end == 3
    assert "3 requests were still in the queue after the last step" in str(summary)


def test_aborted_requests_are_finished_ones_and_their_unknown_numbers_are_left_out(tmp_path: Path):
    recording = two_requests(tmp_path)
    recording.step(num_running_reqs=2, num_added_reqs=2, prefix_cache_hits=32, num_generation_tokens=2)
    unknown = {"num_prompt_tokens": 30, "num_generation_tokens": 0, "num_cached_tokens": -1}
    recording.finish(2, finish_reason=2, **unknown)
    recording.finish(3, finish_reason=2, num_prompt_tokens=20, num_generation_tokens=2, num_cached_tokens=16)
    recording.step(**idle(num_finished_reqs=2, num_aborted_reqs=2, num_prompt_tokens_computed=20))
    accounts = of(recording)
    assert all(account.ok for account in accounts.values())
    assert (accounts["cached tokens"].left, accounts["cached tokens"].right) == (64, 48)
    assert (accounts["prompt tokens"].left, accounts["prompt tokens"].right) == (120, 120)
    assert (accounts["requests"].left, accounts["requests"].right) == (4, 4)
    summary = kvhook.open(recording.path).summary()
    assert summary.num_aborted_reqs == 2
    assert "finished        4 requests (abort 2, stop 2)" in str(summary)


def test_a_stop_string_that_the_scheduler_has_not_heard_of_explains_one_request(tmp_path: Path):
    recording = Recording(tmp_path)
    recording.step(num_running_reqs=1, num_added_reqs=1)
    recording.finish(0, finish_reason=0, num_generation_tokens=2)
    recording.step(num_running_reqs=1, num_finished_reqs=1)
    account = of(recording)["requests"]
    assert (account.left, account.right, account.ok) == (1, 2, True)
    assert account.explained_by == "the front end ended requests before the scheduler knew"


def test_at_level_light_any_request_that_finished_may_be_one_that_the_scheduler_still_has(tmp_path: Path):
    recording = Recording(tmp_path)
    recording.step(level=1, num_running_reqs=1, num_added_reqs=1)
    recording.step(level=1, num_running_reqs=1, num_finished_reqs=1)
    recording.step(level=1, num_running_reqs=1, num_added_reqs=1)
    recording.step(**idle(level=1, num_finished_reqs=1))
    summary = kvhook.open(recording.path).summary()
    assert (summary.num_reqs_before, summary.num_added_reqs, summary.num_finished_reqs) == (0, 2, 2)
    assert of(recording)["requests"].ok


@pytest.mark.parametrize(("vllm", "ok"), [("0.26.0", True), ("0.27.0", False)])
def test_repeated_look_ups_explain_hits_only_where_the_release_repeats_them(tmp_path: Path, vllm: str, ok: bool):
    recording = two_requests(tmp_path, vllm=vllm)
    recording.step(num_waiting_reqs=1, num_running_reqs=0, num_added_reqs=1, num_generation_tokens=0)
    recording.finish(2, num_prompt_tokens=40, num_cached_tokens=32, num_generation_tokens=1)
    recording.step(
        **idle(prefix_cache_hits=64, num_finished_reqs=1, num_generation_tokens=1, num_prompt_tokens_computed=40)
    )
    account = of(recording)["cached tokens"]
    assert (account.left, account.right, account.ok) == (96, 64, ok)


@pytest.mark.parametrize(("used", "peak", "bad"), [(90, 95, 0), (101, -1, 1), (50, 101, 1), (60, 50, 1), (60, -1, 0)])
def test_blocks_in_use_are_at_most_the_peak_and_that_at_most_all(tmp_path: Path, used: int, peak: int, bad: int):
    recording = Recording(tmp_path)
    recording.step(num_kv_blocks_used=used, num_kv_blocks_peak=peak)
    account = of(recording)["blocks in use"]
    assert (account.left, account.right, account.ok) == (bad, 0, not bad)


@pytest.mark.parametrize(("groups", "hits", "ok"), [(1, 48, True), (1, 40, False), (2, 40, None), (None, 40, None)])
def test_hits_are_whole_blocks_where_there_is_one_kind_of_layers(
    tmp_path: Path, groups: int | None, hits: int, ok: bool | None
):
    recording = Recording(tmp_path, num_kv_cache_groups=groups)
    recording.step(prefix_cache_queries=100, prefix_cache_hits=hits)
    account = of(recording).get("whole blocks")
    assert (account.ok if account else None) == ok


def test_accounts_are_in_the_dictionary_as_plain_values(tmp_path: Path):
    as_dict = kvhook.open(two_requests(tmp_path).path).summary().as_dict()
    assert as_dict["accounts"][0] == {
        "name": "cached tokens",
        "unit": "tokens",
        "left_is": "tokens found in look-ups",
        "right_is": "cached tokens of requests",
        "left": 32,
        "right": 32,
        "difference": 0,
        "explained_by": "",
        "ok": True,
        "engines": [0],
    }


def test_a_vllm_that_does_not_see_requests_has_no_account_of_them(tmp_path: Path):
    absent = {"step": {"num_added_reqs": "no place"}, "request": {}}
    recording = Recording(tmp_path, absent=absent).run(3)
    trace = kvhook.open(recording.path)
    assert queue_of(trace.steps(), trace.requests()) is None
    assert "requests" not in by_name(trace)
    assert trace.summary().num_reqs_before is None
