"""What a diagnosis infers where the engine core's account is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

import kvhook
from kvhook.analysis.diagnosis.finding import INFERRED, Finding
from tests.sick_runs import Run


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
    assert kvhook.open(run.front.path).summary().never_looked_up == (1000, 2000, True)
    assert "never_looked_up" in found


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
