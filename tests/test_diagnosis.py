"""A diagnosis names what a run suffers from, and nothing else, over runs that are made by hand with and without it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kvhook
from kvhook.analysis.diagnosis.finding import INFERRED, RECORDED, Finding
from kvhook.analysis.diagnosis.rules import NAMES, RULES
from kvhook.analysis.summarize import summarize
from kvhook.core.beginnings import MOST_TOKENS, PROMPTS, Beginnings
from kvhook.text.summary import printed
from tests.ring.synthetic import MS, CoreRecording, Recording


class Run:
    """A run of an engine and its core. What a test does not say is healthy: half of the prompts' tokens are found."""

    def __init__(self, folder: Path, **facts: Any) -> None:
        shared = {"block_size": 16, "max_num_seqs": 16, "enable_prefix_caching": True, **facts}
        self.front = Recording(folder / "front", slots=4096, **shared)
        self.core = CoreRecording(folder / "core", **shared)
        self.requests = 0

    def steps(self, count: int, **values: Any) -> None:
        """So many steps of the engine and of its core."""
        for _ in range(count):
            self.core.step(**values)
            self.front.step(0.5, num_running_reqs=10, num_generation_tokens=10)

    def request(self, *, tokens: int = 101, found: int = 48, arrived: int = 0, **values: Any) -> None:
        """A request that was looked up, scheduled and has ended."""
        known = {"resumed": 0, "num_shared_tokens": found, "miss_reason": "diverged"} | values
        self.core.record(
            "lookup", request=self.requests, t_ns=100 * MS, num_tokens=tokens, num_found_tokens=found, **known
        )
        self.core.record("core_request", request=self.requests, t_arrived_ns=arrived)
        asked = known["miss_reason"] != "not_looked_up"
        self.front.finish(self.requests, num_prompt_tokens=tokens, num_cached_tokens=found)
        self.front.step(
            0.5,
            num_running_reqs=10,
            prefix_cache_queries=tokens * asked,
            prefix_cache_hits=found * asked,
            num_prompt_tokens=tokens,
        )
        self.requests += 1

    def findings(self, *, with_core: bool = True) -> dict[str, Finding]:
        summary = summarize(kvhook.open(self.front.path), None, self.core.cores() if with_core else None)
        json.dumps(summary.as_dict())
        shown = str(printed(summary))
        for finding in summary.findings:
            assert finding.text.split(".")[0][:40] in shown
            assert "->" in shown
            assert finding.setting
            assert finding.evidence
        assert len({f.name for f in summary.findings}) == len(summary.findings)
        assert max(map(len, shown.partition("  diagnosis ")[2].splitlines()), default=0) <= 100
        return {finding.name: finding for finding in summary.findings}


def healthy(run: Run, seed: int = 0) -> Run:
    """Requests that share half of their prompts come, prefill beside others that decode, and find room."""
    rng = random.Random(seed)
    for _ in range(30):
        run.request(tokens=rng.randrange(90, 130), found=48)
        run.steps(1, num_prefill_tokens=60, took_ms=rng.uniform(1, 2))
        run.steps(rng.randrange(2, 6), took_ms=rng.uniform(0.8, 1.2))
    return run


def blocks_run_out(run: Run) -> None:
    run.steps(40, limited_by="kv_blocks", used=98, cached=2)


def preemptions(run: Run) -> None:
    for number in range(5):
        run.core.record("preemption", request=number, num_lost_tokens=120)
    run.steps(10, num_recomputed_tokens=60)


def evictions(run: Run) -> None:
    """The requests came after their blocks had been evicted."""
    for _ in range(10):
        run.request(
            found=0, miss_reason="evicted", num_evicted_tokens=96, evicted_steps=4, evicted_ns=10 * MS, arrived=95 * MS
        )


def a_bad_order(run: Run) -> None:
    """The requests waited already when their blocks were evicted."""
    for _ in range(10):
        run.request(
            found=0, miss_reason="evicted", num_evicted_tokens=96, evicted_steps=4, evicted_ns=10 * MS, arrived=20 * MS
        )


def short_beginnings(run: Run) -> None:
    for _ in range(40):
        run.request(found=0, num_shared_tokens=15, miss_reason="never_seen")


def short_prompts(run: Run) -> None:
    for _ in range(40):
        run.request(tokens=12, found=0, miss_reason="short")


def unasked(run: Run) -> None:
    for _ in range(10):
        run.request(found=0, miss_reason="not_looked_up")


def siblings(run: Run) -> None:
    for prompt in range(100, 112):
        for sample in range(4):
            run.front.finish(prompt, sample_index=sample, num_cached_tokens=96 if sample else 0, num_prompt_tokens=101)
        run.front.step(0.5)


def held_up(run: Run) -> None:
    run.steps(30, num_prefill_tokens=900, took_ms=12)


def no_seats(run: Run) -> None:
    run.steps(40, limited_by="max_num_seqs", used=30, cached=30)


def no_tokens(run: Run) -> None:
    run.steps(80, limited_by="token_budget", num_prefill_tokens=40)


#: What the core tells -> a run that has it, on top of a healthy one.
DISEASES: dict[str, Callable[[Run], None]] = {
    "cache_too_small": blocks_run_out,
    "preemption_thrash": preemptions,
    "evicted_too_early": evictions,
    "order_spoils_sharing": a_bad_order,
    "shared_beginning_below_block": short_beginnings,
    "never_looked_up": unasked,
    "prefill_holds_up_decode": held_up,
    "limited_by_max_num_seqs": no_seats,
    "limited_by_token_budget": no_tokens,
}
#: Findings that another one brings with it.
TOGETHER = {"order_spoils_sharing": {"evicted_too_early"}}


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


# Without the engine core's account


def inferred(run: Run) -> dict[str, Finding]:
    found = run.findings(with_core=False)
    assert {f.basis for f in found.values()} <= {INFERRED}
    return found


def test_a_full_cache_and_a_queue_are_inferred(tmp_path: Path):
    run = Run(tmp_path)
    for _ in range(40):
        run.front.step(0.95, num_running_reqs=10, num_waiting_reqs=5)
    found = inferred(run)
    assert set(found) == {"cache_too_small"}
    assert "probably" in found["cache_too_small"].text
    # full, and nobody waits: as it should be
    idle = Run(tmp_path / "idle")
    for _ in range(40):
        idle.front.step(0.95, num_running_reqs=10, num_waiting_reqs=0)
    assert inferred(idle) == {}


@pytest.mark.parametrize(("running", "name"), [(16, "limited_by_max_num_seqs"), (6, "limited_by_token_budget")])
def test_what_limits_the_batch_is_inferred_from_the_queue(tmp_path: Path, running: int, name: str):
    run = Run(tmp_path)
    for _ in range(40):
        run.front.step(0.3, num_running_reqs=running, num_waiting_reqs=5)
    assert set(inferred(run)) == {name}


@pytest.mark.parametrize("also", [None, preemptions, blocks_run_out])
def test_more_requests_are_advised_without_reserve_only_where_blocks_do_not_run_out(tmp_path: Path, also: Any):
    run = Run(tmp_path)
    no_seats(run)
    if also is not None:
        also(run)
    advice = run.findings()["limited_by_max_num_seqs"].setting
    assert advice.startswith("a larger max_num_seqs")
    assert ("only with more blocks" in advice) == (also is not None)


def test_preemptions_are_inferred(tmp_path: Path):
    run = Run(tmp_path)
    for number in range(20):
        run.front.finish(number, num_prompt_tokens=50)
        run.front.step(num_preempted_reqs=number % 4 == 0)
    assert set(inferred(run)) == {"preemption_thrash"}


@pytest.mark.parametrize(("times", "sick"), [(8, True), (1.5, False)])
def test_prefill_that_holds_up_decode_is_inferred(tmp_path: Path, times: float, sick: bool):
    run = Run(tmp_path)
    for step in range(60):
        first = step % 4 == 0
        took = 0.01 * (times if first else 1)
        latencies = {"itl_count": 5, "itl_sum": 5 * took, "itl_min": took, "itl_max": took}
        run.front.step(**latencies, ttft_count=int(first), ttft_min=1.0, ttft_max=1.0, ttft_sum=1.0)
    assert set(inferred(run)) == ({"prefill_holds_up_decode"} if sick else set())


def test_samples_without_prefix_caching_are_inferred(tmp_path: Path):
    run = Run(tmp_path, enable_prefix_caching=False)
    for prompt in range(6):
        for sample in range(4):
            run.front.finish(prompt, sample_index=sample, num_prompt_tokens=100)
        run.front.step(num_prompt_tokens=400)
    found = inferred(run)
    assert set(found) == {"prefix_cache_off"}
    assert found["prefix_cache_off"].evidence["sample_tokens"] == 6 * 3 * 100


def test_prompts_that_were_never_looked_up_are_inferred(tmp_path: Path):
    run = Run(tmp_path)
    run.front.step(num_added_reqs=20, num_running_reqs=20)
    for number in range(20):
        run.front.finish(number, num_prompt_tokens=100, num_generation_tokens=1)
    run.front.step(num_prompt_tokens=2000, prefix_cache_queries=1000, prefix_cache_hits=500, num_running_reqs=0)
    found = run.findings(with_core=False)
    if kvhook.open(run.front.path).summary().never_looked_up is not None:
        assert "never_looked_up" in found


def test_runs_without_anything_have_no_finding(tmp_path: Path):
    assert Run(tmp_path / "empty").findings() == {}
    one = Run(tmp_path / "one")
    one.steps(1)
    assert one.findings() == {}


def test_a_summary_of_a_running_session_has_the_same_findings(fresh: Path):
    from tests.standin import fake_vllm, step_stats

    with fake_vllm() as vllm, kvhook.install(trace=fresh / "run.kvh") as session:
        engine = vllm.engine()
        for _ in range(40):
            engine.plan.append(step_stats(kv_cache_usage=0.97, num_running_reqs=4, num_waiting_reqs=9))
            engine.step()
        findings = session.summary().findings
        assert [f.name for f in findings] == ["cache_too_small"]
        assert session.trace().summary().findings == findings
    assert kvhook.open(fresh / "run.kvh").summary().findings == findings


# Shared beginnings


def test_what_prompts_share_is_what_a_plain_comparison_says():
    rng = random.Random(5)
    beginnings, before = Beginnings(), list[list[int]]()
    for _ in range(300):
        prompt = [rng.randrange(3) for _ in range(rng.randrange(0, 200))]
        if before and rng.random() < 0.6:
            prompt = rng.choice(before)[: rng.randrange(200)] + prompt
        plain = max(
            (
                sum(1 for i in range(min(len(prompt), len(o))) if prompt[: i + 1] == o[: i + 1])
                for o in before[-PROMPTS:]
            ),
            default=0,
        )
        assert beginnings.shared(prompt) == plain
        if prompt:
            before.append(prompt)


def test_prompts_without_token_ids_share_nothing_and_long_ones_are_compared_in_part():
    beginnings = Beginnings()
    assert beginnings.shared(None) == 0
    assert beginnings.shared([]) == 0
    long = list(range(MOST_TOKENS + 500))
    assert beginnings.shared(long) == 0
    assert beginnings.shared(list(long)) == MOST_TOKENS
