"""The whole way, from the stats a step brings to the summary, against plain Python over the same numbers."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kvhook
from kvhook.analysis.distribution import Distribution
from kvhook.analysis.summary import Summary
from tests.standin import NO_STATS, fake_vllm, step_stats

REASONS = ["stop", "length", "abort", "error", "repetition"]
BLOCKS = 60


def latency_list(rng: random.Random) -> list[float]:
    """None, one, two, all equal, a few, or more than fit into one slot."""
    n = rng.choice([0, 0, 1, 2, 3, 5, 130])
    if rng.random() < 0.4:
        return [rng.uniform(0.001, 0.1)] * n
    return [rng.uniform(0.001, 0.1) for _ in range(n)]


def invent(rng: random.Random) -> dict[str, Any]:
    """One step's numbers."""
    queries = rng.randrange(0, 500)
    prompt = rng.randrange(0, 300)
    cached = rng.randrange(0, prompt + 1)
    used = rng.randrange(0, BLOCKS + 1)
    finished = [
        {
            "finish_reason": rng.randrange(len(REASONS)),
            "request_id": str(rng.randrange(1000)),
            "num_prompt_tokens": rng.randrange(1, 300),
            "num_generation_tokens": rng.choice([1, 1, 2, 30]),
            "num_cached_tokens": rng.randrange(0, 100),
            "num_preemptions": rng.randrange(0, 3),
            "max_tokens_param": rng.choice([None, 16]),
            "queued_time": rng.random(),
            "prefill_time": rng.random(),
            "decode_time": rng.random(),
            "inference_time": rng.random(),
            "e2e_latency": rng.random() + 1,
            "mean_time_per_output_token": rng.random(),
            "ttft": rng.random(),
        }
        for _ in range(rng.choice([0, 0, 1, 3]))
    ]
    return {
        "num_running_reqs": rng.randrange(0, 24),
        "num_waiting_reqs": rng.randrange(0, 40),
        "num_skipped_waiting_reqs": rng.randrange(0, 5),
        # as vLLM computes it, rounding errors and all
        "kv_cache_usage": 1.0 - (BLOCKS - used) / BLOCKS,
        "prefix": {
            "requests": rng.randrange(0, 4),
            "queries": queries,
            "hits": rng.randrange(0, queries + 1),
            "preempted_requests": rng.randrange(0, 2),
            "preempted_queries": 50,
            "preempted_hits": rng.randrange(0, 50),
        },
        "prompt": {"total": prompt, "computed": prompt - cached, "cached_tokens": cached},
        "generated": rng.randrange(0, 24),
        "preempted": rng.randrange(0, 2),
        "ttft": latency_list(rng),
        "itl": latency_list(rng),
        "finished": finished,
        "used": used,
    }


class Run:
    """A run of invented steps, what kvhook made of it, and the invented numbers."""

    def __init__(self, session: kvhook.Session, invented: list[dict[str, Any]], without: int) -> None:
        self.session, self.invented, self.without = session, invented, without
        self.steps, self.requests = session.steps(), session.requests()
        self.summary: Summary = session.summary()

    def total(self, *path: str) -> int:
        return sum(_follow(step, path) for step in self.invented)

    def all(self, *path: str) -> list[Any]:
        return [_follow(step, path) for step in self.invented]


def _follow(value: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        value = value[name]
    return value


@pytest.fixture(scope="module", params=[1, 2, 3])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    rng = random.Random(request.param)
    invented = [invent(rng) for _ in range(400)]
    kvhook.uninstall()
    with fake_vllm() as vllm, kvhook.install(ring_dir=tmp_path_factory.mktemp("rings")) as session:
        engine = vllm.engine(num_gpu_blocks=BLOCKS + 1)
        without = 0
        for step in invented:
            if rng.random() < 0.1:
                engine.plan.append(NO_STATS)
                engine.step()
                without += 1
            engine.plan.append(step_stats(**{k: v for k, v in step.items() if k != "used"}))
            engine.step()
        yield Run(session, invented, without)


def same(d: Distribution, values: list[float]) -> None:
    """A distribution is that of these values, by Python's own statistics."""
    assert d.count == len(values)
    assert d.max == max(values)
    assert d.mean == pytest.approx(statistics.fmean(values))
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    assert (d.p50, d.p90, d.p99) == pytest.approx((cuts[49], cuts[89], cuts[98]))


# Columns


STEP_COLUMNS = {
    "num_running_reqs": ("num_running_reqs",),
    "num_skipped_waiting_reqs": ("num_skipped_waiting_reqs",),
    "kv_cache_usage": ("kv_cache_usage",),
    "num_kv_blocks_used": ("used",),
    "prefix_cache_requests": ("prefix", "requests"),
    "prefix_cache_queries": ("prefix", "queries"),
    "prefix_cache_hits": ("prefix", "hits"),
    "prefix_cache_preempted_requests": ("prefix", "preempted_requests"),
    "prefix_cache_preempted_queries": ("prefix", "preempted_queries"),
    "prefix_cache_preempted_hits": ("prefix", "preempted_hits"),
    "num_prompt_tokens": ("prompt", "total"),
    "num_prompt_tokens_computed": ("prompt", "computed"),
    "num_prompt_tokens_cached": ("prompt", "cached_tokens"),
    "num_generation_tokens": ("generated",),
    "num_preempted_reqs": ("preempted",),
}


@pytest.mark.parametrize("column", STEP_COLUMNS)
def test_step_column_holds_what_the_step_brought(run: Run, column: str):
    recorded = run.steps[run.steps["has_scheduler_stats"] == 1]
    assert recorded[column].tolist() == run.all(*STEP_COLUMNS[column])


def test_steps_are_all_there(run: Run):
    assert run.steps["step"].tolist() == list(range(len(run.invented) + run.without))
    assert (run.steps["num_kv_blocks"] == BLOCKS).all()


@pytest.mark.parametrize("series", ["ttft", "itl"])
def test_step_tells_count_sum_min_and_max_of_its_latencies(run: Run, series: str):
    recorded = run.steps[run.steps["has_scheduler_stats"] == 1]
    lists = run.all(series)
    assert recorded[f"{series}_count"].tolist() == [len(v) for v in lists]
    assert recorded[f"{series}_sum"].tolist() == pytest.approx([math.fsum(v) for v in lists])
    assert recorded[f"{series}_min"].tolist() == [min(v, default=0) for v in lists]
    assert recorded[f"{series}_max"].tolist() == [max(v, default=0) for v in lists]


@pytest.mark.parametrize(("series", "name"), [("ttft", "time_to_first_token"), ("itl", "inter_token_latency")])
def test_every_single_latency_is_kept(run: Run, series: str, name: str):
    values, counts = run.session.latencies(name)
    got: Counter[float] = Counter()
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        got[value] += count
    assert got == Counter(v for step in run.invented for v in step[series])


REQUEST_COLUMNS = [
    "num_prompt_tokens",
    "num_generation_tokens",
    "num_cached_tokens",
    "num_preemptions",
    "queued_time",
    "prefill_time",
    "decode_time",
    "inference_time",
    "e2e_latency",
    "mean_time_per_output_token",
]


@pytest.mark.parametrize("column", REQUEST_COLUMNS)
def test_request_column_holds_what_was_finished(run: Run, column: str):
    assert run.requests[column].tolist() == [r[column] for step in run.invented for r in step["finished"]]


def test_requests_are_numbered_named_and_have_a_reason(run: Run):
    finished = [r for step in run.invented for r in step["finished"]]
    assert run.requests["request"].tolist() == list(range(len(finished)))
    assert run.requests["request_id"].tolist() == [int(r["request_id"]) for r in finished]
    assert run.requests["finish_reason"].tolist() == [REASONS[r["finish_reason"]] for r in finished]
    assert run.requests["time_to_first_token"].tolist() == [r["ttft"] for r in finished]
    assert run.requests["max_tokens"].tolist() == [r["max_tokens_param"] or -1 for r in finished]


def test_requests_belong_to_the_step_they_finished_in(run: Run):
    per_step = Counter(run.requests["step"].tolist())
    counted = {s["step"]: s["num_finished_reqs"] for s in run.steps if s["num_finished_reqs"]}
    assert per_step == counted
    with_stats = run.steps[run.steps["has_scheduler_stats"] == 1]
    assert with_stats["num_finished_reqs"].tolist() == [len(s["finished"]) for s in run.invented]


# Summary


def test_sums(run: Run):
    s = run.summary
    assert s.prefix_cache_queries == run.total("prefix", "queries")
    assert s.prefix_cache_hits == run.total("prefix", "hits")
    assert s.prefix_cache_preempted_queries == run.total("prefix", "preempted_queries")
    assert s.prefix_cache_preempted_hits == run.total("prefix", "preempted_hits")
    assert s.num_prompt_tokens == run.total("prompt", "total")
    assert s.num_prompt_tokens_computed == run.total("prompt", "computed")
    assert s.num_prompt_tokens_cached == run.total("prompt", "cached_tokens")
    assert s.num_generation_tokens == run.total("generated")
    assert s.num_preempted_reqs == run.total("preempted")


def test_hit_rate_is_of_this_run_and_preempted_requests_are_apart(run: Run):
    hits, again = run.total("prefix", "hits"), run.total("prefix", "preempted_hits")
    assert run.summary.prefix_cache_hit_rate == hits / run.total("prefix", "queries")
    assert run.summary.preempted_share_of_hits == again / (hits + again)


def test_usage_is_over_the_steps_that_brought_stats(run: Run):
    usage = run.all("kv_cache_usage")
    s = run.summary
    assert s.kv_cache_usage_peak == max(usage)
    assert s.kv_cache_usage_mean == pytest.approx(statistics.fmean(usage))
    assert s.kv_cache_usage_p95 == pytest.approx(statistics.quantiles(usage, n=100, method="inclusive")[94])
    assert s.num_kv_blocks == BLOCKS
    assert s.block_size == 32


def test_running_and_waiting(run: Run):
    s, running = run.summary, run.all("num_running_reqs")
    waiting = [a + b for a, b in zip(run.all("num_waiting_reqs"), run.all("num_skipped_waiting_reqs"), strict=True)]
    assert (s.num_running_reqs_peak, s.num_waiting_reqs_peak) == (max(running), max(waiting))
    assert s.num_running_reqs_mean == pytest.approx(statistics.fmean(running))
    assert s.num_waiting_reqs_mean == pytest.approx(statistics.fmean(waiting))


def test_steps_and_times(run: Run):
    s, steps = run.summary, run.steps
    starts, ends = steps["t_start_ns"].tolist(), steps["t_end_ns"].tolist()
    assert (s.steps, s.steps_without_stats) == (len(run.invented) + run.without, run.without)
    assert s.wall_time == pytest.approx((max(ends) - min(starts)) / 1e9)
    assert s.time_in_steps == pytest.approx(sum(b - a for a, b in zip(starts, ends, strict=True)) / 1e9)
    same(s.step_time, [(b - a) / 1e9 for a, b in zip(starts, ends, strict=True)])
    assert s.prompt_tokens_per_second == pytest.approx(run.total("prompt", "total") / s.time_in_steps)
    assert s.generation_tokens_per_second == pytest.approx(run.total("generated") / s.time_in_steps)


def test_latencies_are_exact(run: Run):
    s = run.summary
    finished = [r for step in run.invented for r in step["finished"]]
    same(s.time_to_first_token, [v for step in run.invented for v in step["ttft"]])
    same(s.inter_token_latency, [v for step in run.invented for v in step["itl"]])
    same(s.e2e_latency, [r["e2e_latency"] for r in finished])
    # a request of one token has no time per output token
    same(
        s.mean_time_per_output_token,
        [r["mean_time_per_output_token"] for r in finished if r["num_generation_tokens"] > 1],
    )


def test_finished_requests_by_reason(run: Run):
    reasons = Counter(REASONS[r["finish_reason"]] for step in run.invented for r in step["finished"])
    assert run.summary.num_finished_reqs == reasons.total()
    assert run.summary.finished_by_reason == dict(reasons)


def test_own_cost_is_that_of_the_steps_that_were_measured(run: Run):
    s = run.summary
    measured = [v for v in run.steps["kvhook_ns"].tolist() if v >= 0]
    assert len(measured) >= len(run.steps) // 10
    call = run.session.meta["engines"][0]["hook_call_ns"]
    assert s.kvhook_ns_p50 == pytest.approx(statistics.median(measured) + call)
    expected = (statistics.fmean(measured) + call) * len(run.steps) / 1e9 / s.time_in_steps
    assert s.kvhook_share == pytest.approx(expected)


def test_nothing_was_lost(run: Run):
    assert (run.summary.records_lost, run.summary.records_dropped, run.summary.faults) == (0, 0, {})


def test_as_dict_is_plain_json_with_every_number(run: Run):
    as_dict = run.summary.as_dict()
    back = json.loads(json.dumps(as_dict, allow_nan=False))
    assert back == as_dict
    assert back["time_to_first_token"]["p99"] == run.summary.time_to_first_token.p99
    assert back["steps"] == run.summary.steps


def test_text_shows_the_numbers_a_person_wants(run: Run):
    text = str(run.summary)
    s = run.summary
    assert f"{s.steps:,} steps" in text
    assert f"hit rate {100 * (s.prefix_cache_hit_rate or 0):.1f} %" in text
    assert f"{s.prefix_cache_hits:,} of {s.prefix_cache_queries:,} tokens" in text
    assert f"peak {100 * (s.kv_cache_usage_peak or 0):.1f} %" in text
    assert f"{s.num_finished_reqs:,} requests" in text
    assert max(map(len, text.splitlines())) <= 110


# Runs that lack something


@pytest.fixture
def short(fresh: Path) -> Iterator[Any]:
    with fake_vllm() as vllm, kvhook.install() as session:

        def play(*steps: Any, **engine: Any) -> Summary:
            one = vllm.engine(**engine)
            one.plan += steps
            for _ in steps:
                one.step()
            return session.summary()

        yield play


def test_before_the_first_engine_everything_answers(fresh: Path):
    with kvhook.install() as session:
        assert len(session.steps()) == len(session.requests()) == 0
        assert "kv_cache_usage" in (session.steps().dtype.names or ())
        assert session.summary().steps == 0
        assert "no steps yet" in str(session.summary())
        assert session.meta["engines"] == []
        json.dumps(session.summary().as_dict(), allow_nan=False)


def test_before_the_first_step_everything_answers(short: Any):
    summary = short()
    assert (summary.engines, summary.steps, summary.model) == (1, 0, "stand-in")
    assert summary.kv_cache_usage_peak is None
    assert summary.prefix_cache_hit_rate is None
    assert "no steps yet" in str(summary)


def test_no_lookups_give_no_hit_rate(short: Any):
    summary = short(step_stats())
    assert summary.prefix_cache_queries == 0
    assert summary.prefix_cache_hit_rate is None
    assert "no look-ups yet" in str(summary)


def test_prefix_caching_off_gives_no_hit_rate_and_says_why(short: Any):
    summary = short(step_stats(), enable_prefix_caching=False)
    assert summary.prefix_caching is False
    assert summary.prefix_cache_hit_rate is None
    assert "off (enable_prefix_caching=False)" in str(summary)


def test_steps_without_stats_alone_give_no_usage(short: Any):
    summary = short(NO_STATS, NO_STATS)
    assert (summary.steps, summary.steps_without_stats) == (2, 2)
    assert summary.kv_cache_usage_mean is None
    assert summary.num_running_reqs_peak is None
    assert "not known" in str(summary)
    json.dumps(summary.as_dict(), allow_nan=False)


def test_no_latencies_are_none_in_the_dictionary_and_a_dash_in_the_text(short: Any):
    summary = short(step_stats())
    assert summary.as_dict()["time_to_first_token"] == {
        "count": 0, "mean": None, "p50": None, "p90": None, "p99": None, "max": None,
    }  # fmt: skip
    (line,) = [line for line in str(summary).splitlines() if "first token" in line]
    assert line.split()[2:] == ["0", "-", "-", "-", "-", "-"]


def test_series_that_does_not_exist_is_named_with_those_that_do(fresh: Path):
    with kvhook.install() as session, pytest.raises(kvhook.KvhookError, match="time_to_first_token, inter_token"):
        session.latencies("ttft")


def test_finish_reason_of_a_later_release_keeps_its_number(short: Any, fresh: Path):
    short(step_stats(finished=[{"finish_reason": 9}]))
    assert kvhook.install().requests()["finish_reason"].tolist() == ["9"]
