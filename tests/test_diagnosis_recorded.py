"""A diagnosis names what a run suffers from, and nothing else, where the engine core was recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvhook.analysis.diagnosis.finding import RECORDED
from kvhook.analysis.diagnosis.rules import NAMES, RULES
from tests.sick_runs import (
    DISEASES,
    TOGETHER,
    Run,
    a_bad_order,
    blocks_run_out,
    healthy,
    no_seats,
    preemptions,
    short_beginnings,
    short_prompts,
    siblings,
    unasked,
)


@pytest.mark.parametrize("seed", range(10))
def test_a_healthy_run_has_no_finding(tmp_path: Path, seed: int):
    run = healthy(Run(tmp_path), seed)
    assert run.findings() == {}
    assert run.findings(with_core=False) == {}


@pytest.mark.parametrize("name", DISEASES)
def test_each_disease_is_found_and_no_other(tmp_path: Path, name: str):
    run = healthy(Run(tmp_path))
    DISEASES[name](run)
    found = run.findings()
    assert set(found) == {name} | TOGETHER.get(name, set())
    assert found[name].basis == RECORDED


def test_a_sick_run_has_many_findings_at_once(tmp_path: Path):
    run = Run(tmp_path)
    for make_sick in (blocks_run_out, preemptions, a_bad_order, unasked):
        make_sick(run)
    wanted = {"cache_too_small", "preemption_thrash", "evicted_too_early", "order_spoils_sharing", "never_looked_up"}
    assert wanted <= set(run.findings())


def test_every_rule_has_a_name_and_a_test():
    mine = {*DISEASES, "prefix_cache_off", "prefix_cache_useless", "hits_only_from_siblings", "cache_mostly_empty"}
    assert mine == set(NAMES)
    assert len(RULES) == len(NAMES)


def test_the_evidence_is_what_was_recorded(tmp_path: Path):
    run = Run(tmp_path)
    blocks_run_out(run)
    run.steps(60)
    preemptions(run)
    found = run.findings()
    assert found["cache_too_small"].evidence["share"] == 40 / 110
    assert "36 % of the steps" in found["cache_too_small"].text
    assert found["preemption_thrash"].evidence["recomputed_tokens"] == 600
    assert found["preemption_thrash"].evidence["lost_tokens"] == 600
    assert found["preemption_thrash"].evidence["share"] == 600 / (110 * 10 + 600)


def test_an_order_s_gain_is_what_waiting_requests_missed(tmp_path: Path):
    run = Run(tmp_path)
    run.steps(5)
    for _ in range(10):
        run.request(tokens=100, found=48)
    a_bad_order(run)
    evidence = run.findings()["order_spoils_sharing"].evidence
    assert evidence["requests"] == 10
    assert evidence["tokens"] == 10 * 96  # whole blocks of 101 tokens, but not the last token
    assert evidence["hit_rate"] == 480 / 2010
    assert evidence["hit_rate_at_most"] == (480 + 960) / 2010


def test_short_beginnings_and_short_prompts_are_told_apart(tmp_path: Path):
    for make, word in ((short_beginnings, "15 tokens on average"), (short_prompts, "shorter than a block")):
        run = Run(tmp_path / word.split()[0])
        run.steps(5)
        make(run)
        found = run.findings()
        assert set(found) == {"shared_beginning_below_block"}
        assert word in found["shared_beginning_below_block"].text
        assert "block_size than 16" in found["shared_beginning_below_block"].setting


def test_a_few_common_tokens_are_no_shared_beginning(tmp_path: Path):
    run = Run(tmp_path)
    for _ in range(40):
        run.request(found=0, num_shared_tokens=3, miss_reason="never_seen")
    assert set(run.findings()) == {"prefix_cache_useless"}


def test_prompts_that_share_nothing_make_prefix_caching_useless(tmp_path: Path):
    run = Run(tmp_path)
    for _ in range(40):
        run.request(found=0, num_shared_tokens=1, miss_reason="never_seen")
    found = run.findings()
    assert set(found) == {"prefix_cache_useless"}
    assert found["prefix_cache_useless"].evidence["queries"] == 40 * 101
    # a small run says nothing about a workload
    few = Run(tmp_path / "few")
    for _ in range(5):
        few.request(found=0, num_shared_tokens=1, miss_reason="never_seen")
    assert few.findings() == {}


def test_hits_that_all_come_from_siblings_are_told(tmp_path: Path):
    run = Run(tmp_path)
    siblings(run)
    assert set(run.findings()) == {"hits_only_from_siblings"}
    # beside as many hits across prompts they are not
    siblings(mixed := Run(tmp_path / "mixed"))
    for _ in range(40):
        mixed.request()
    assert "hits_only_from_siblings" not in mixed.findings()


@pytest.mark.parametrize(("shared", "sick"), [(64, True), (2, False)])
def test_prefix_caching_that_is_off_and_would_help_is_told(tmp_path: Path, shared: int, sick: bool):
    run = Run(tmp_path, enable_prefix_caching=False)
    run.steps(5)
    for _ in range(20):
        run.request(found=0, num_shared_tokens=shared, miss_reason="not_looked_up")
    found = run.findings()
    assert set(found) == ({"prefix_cache_off"} if sick else set())
    if sick:
        assert found["prefix_cache_off"].evidence["tokens"] == 20 * 64
        assert found["prefix_cache_off"].setting == "enable_prefix_caching=True"


@pytest.mark.parametrize(("used", "sick"), [(5, True), (60, False)])
def test_a_cache_that_is_mostly_empty_is_told(tmp_path: Path, used: int, sick: bool):
    run = Run(tmp_path)
    run.steps(150, used=used, cached=5)
    assert set(run.findings()) == ({"cache_mostly_empty"} if sick else set())


def test_a_full_cache_of_idle_blocks_is_not_empty(tmp_path: Path):
    run = Run(tmp_path)
    run.steps(150, used=5, cached=90)
    assert run.findings() == {}


def test_seats_limit_only_where_the_cache_has_room(tmp_path: Path):
    run = Run(tmp_path)
    run.steps(40, limited_by="max_num_seqs", used=90, cached=0)
    assert run.findings() == {}


@pytest.mark.parametrize("also", [None, preemptions, blocks_run_out])
def test_more_requests_are_advised_without_reserve_only_where_blocks_do_not_run_out(tmp_path: Path, also: Any):
    run = Run(tmp_path)
    no_seats(run)
    if also is not None:
        also(run)
    advice = run.findings()["limited_by_max_num_seqs"].setting
    assert advice.startswith("a larger max_num_seqs")
    assert ("only with more blocks" in advice) == (also is not None)


def test_runs_without_anything_have_no_finding(tmp_path: Path):
    assert Run(tmp_path / "empty").findings() == {}
    one = Run(tmp_path / "one")
    one.steps(1)
    assert one.findings() == {}
