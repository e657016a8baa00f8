"""The summary's one pass against plain numpy over the tables; and the tables with chosen columns."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvhook
from kvhook.analysis.exact import ExactSum
from kvhook.analysis.values import Values
from kvhook.errors import KvhookError
from kvhook.records.sources import FileSlots
from tests.ring.synthetic import Recording


def invent(folder: Path, seed: int, engine: int = 0) -> Recording:
    """A run of random numbers, with steps without stats or times, and requests of which little is known."""
    rng = np.random.default_rng(seed)
    recording = Recording(folder, slots=8192, engine=engine)
    for _ in range(int(rng.integers(1, 900))):
        for _ in range(int(rng.choice([0, 0, 1, 3]))):
            recording.finish(
                int(rng.integers(-1, 20)),
                finish_reason=int(rng.integers(0, 7)),
                num_prompt_tokens=int(rng.integers(-1, 99)),
                num_generation_tokens=int(rng.integers(-1, 40)),
                num_cached_tokens=int(rng.integers(-1, 64)),
                e2e_latency=float(rng.choice(np.array([math.nan, rng.random()]))),
                mean_time_per_output_token=float(rng.random()),
            )
        known = rng.random() < 0.9
        low = float(rng.random())
        count = int(rng.choice([0, 1, 2, 7]))
        recording.step(
            float(rng.integers(0, 101)) / 100 if known else math.nan,
            took_ms=float(rng.choice([0, 1 + rng.random()], p=[0.05, 0.95])),
            has_scheduler_stats=int(known),
            num_running_reqs=int(rng.integers(0, 30)) if known else -1,
            num_waiting_reqs=int(rng.integers(0, 3)) if known else -1,
            num_added_reqs=int(rng.integers(0, 3)),
            prefix_cache_queries=int(rng.integers(0, 500)),
            prefix_cache_hits=16 * int(rng.integers(0, 9)),
            num_prompt_tokens=int(rng.integers(0, 500)),
            num_generation_tokens=int(rng.integers(0, 30)),
            num_preempted_reqs=int(rng.integers(0, 2)),
            itl_count=count,
            itl_min=low,
            itl_max=low + float(rng.choice([0.0, 0.1])) * (count == 2),
            kvhook_ns=int(rng.integers(1000, 9000)) if rng.random() < 0.5 else -1,
        )
    return recording


def described(values: Any) -> tuple[float, ...]:
    """Count, mean, quantiles and largest by numpy."""
    values = np.asarray(values, float)
    values = values[~np.isnan(values)]
    if not len(values):
        return (0,)
    return (len(values), values.mean(), *np.quantile(values, (0.5, 0.9, 0.99)), values.max())


def expected(steps: Any, requests: Any, call_ns: int) -> dict[str, Any]:
    known = steps[steps["has_scheduler_stats"] == 1]
    took = (steps["t_end_ns"] - steps["t_start_ns"]) / 1e9
    cost = steps["kvhook_ns"][steps["kvhook_ns"] >= 0] + call_ns
    usage = known["kv_cache_usage"]
    reasons, counts = np.unique(requests["finish_reason"], return_counts=True)
    return {
        "steps": len(steps),
        "steps_without_stats": len(steps) - len(known),
        "steps_without_times": int((took == 0).sum()),
        "time_in_steps": took.sum(),
        "kv_cache_usage_mean": usage.mean(),
        "kv_cache_usage_p95": np.quantile(usage, 0.95),
        "kv_cache_usage_peak": usage.max(),
        "num_running_reqs_mean": known["num_running_reqs"].mean(),
        "num_running_reqs_peak": known["num_running_reqs"].max(),
        "num_waiting_reqs_peak": known["num_waiting_reqs"].max(),
        "prefix_cache_hits": steps["prefix_cache_hits"].sum(),
        "prefix_cache_hit_rate": steps["prefix_cache_hits"].sum() / steps["prefix_cache_queries"].sum(),
        "num_prompt_tokens": steps["num_prompt_tokens"].sum(),
        "num_generation_tokens": steps["num_generation_tokens"].sum(),
        "num_finished_reqs": len(requests),
        "kvhook_ns_p50": np.median(cost),
        "kvhook_ns_p99": np.quantile(cost, 0.99),
        "finished_by_reason": dict(zip(reasons.tolist(), counts.tolist(), strict=True)),
    }


@pytest.mark.parametrize("seed", range(8))
def test_the_summary_is_what_numpy_makes_of_the_tables(tmp_path: Path, seed: int):
    both = [invent(tmp_path / str(i), 100 * seed + i) for i in range(2)]
    for paths in ([both[0].path], [r.path for r in both]):
        trace = kvhook.open(*paths)
        steps, requests, s = trace.steps(), trace.requests(), trace.summary()
        for name, value in expected(steps, requests, 500).items():
            assert getattr(s, name) == (value if isinstance(value, dict) else pytest.approx(value, rel=1e-12)), name
        took = (steps["t_end_ns"] - steps["t_start_ns"])[steps["t_end_ns"] != steps["t_start_ns"]] / 1e9
        itl = np.repeat(*trace.latencies("inter_token_latency"))
        several = requests[requests["num_generation_tokens"] > 1]["mean_time_per_output_token"]
        for distribution, values in (
            (s.step_time, took),
            (s.inter_token_latency, itl),
            (s.e2e_latency, requests["e2e_latency"]),
            (s.mean_time_per_output_token, several),
        ):
            want = described(values)
            got = tuple(getattr(distribution, n) for n in ("count", "mean", "p50", "p90", "p99", "max"))[: len(want)]
            assert got == pytest.approx(want, rel=1e-12)


def test_the_summary_reads_a_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "run.kvh"
    invent(tmp_path, 5).spool_to(path, 400)
    read: list[int] = []
    chunks = FileSlots.chunks

    def counted(self: FileSlots, *args: Any) -> Any:
        read.append(1)
        return chunks(self, *args)

    monkeypatch.setattr(FileSlots, "chunks", counted)
    once = kvhook.open(path).summary()
    assert len(read) == 1
    trace = kvhook.open(path)
    assert trace.meta["engines"]  # this needs a pass of its own
    assert trace.summary().as_dict() == once.as_dict()


@pytest.mark.parametrize("runs", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_quantiles_are_exact_however_the_values_come(seed: int, runs: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kvhook.analysis.values.PENDING", 50)
    monkeypatch.setattr("kvhook.analysis.values.MERGED", ((300, 4), (2000, 3)))
    monkeypatch.setattr("kvhook.analysis.values._EVERY", 7)
    monkeypatch.setattr("kvhook.analysis.select._FEW", 40)
    rng = np.random.default_rng(seed)
    plain = rng.choice(rng.normal(size=3000).round(int(rng.integers(1, 9))), 9000)
    counts = rng.integers(0, 4, len(plain))
    parts = [Values(runs=runs) for _ in range(3)]
    cuts = np.sort(rng.integers(0, len(plain), 200))
    for i, (v, c) in enumerate(zip(np.split(plain, cuts), np.split(counts, cuts), strict=True)):
        parts[i % 3].take(v, c if i % 2 else None)
    together = Values()
    for part in parts:
        together.add(part)
    pieces = zip(np.split(plain, cuts), np.split(counts, cuts), strict=True)
    every = np.concatenate([np.repeat(v, c) if i % 2 else v for i, (v, c) in enumerate(pieces)])
    assert together.count == len(every)
    assert together.sum == math.fsum(every.tolist())
    found = together.describe()
    assert (found.p50, found.p90, found.p99) == pytest.approx(np.quantile(every, (0.5, 0.9, 0.99)), rel=1e-15)
    assert together.nth(0.95) == np.quantile(every, 0.95)
    assert together.median() == np.median(every)
    bounds = np.array([-1.0, 0.0, 0.5])
    assert together.up_to(bounds) == [int((every <= bound).sum()) for bound in bounds]


def test_a_sum_does_not_depend_on_the_pieces():
    rng = np.random.default_rng(1)
    values = rng.normal(size=5000) * 10.0 ** rng.integers(-300, 300, 5000)
    whole, pieces = ExactSum(), ExactSum()
    whole.take(values)
    for part in np.array_split(values, 77):
        one = ExactSum()
        one.take(part)
        pieces.add(one)
    assert whole.value == pieces.value == math.fsum(values.tolist())
    whole.take(np.array([math.inf]))
    assert whole.value == math.inf


# Tables with chosen columns


@pytest.fixture
def trace(tmp_path: Path) -> kvhook.Trace:
    return kvhook.open(invent(tmp_path, 5).path)


def test_chosen_columns_are_those_of_the_whole_table(trace: kvhook.Trace):
    names = ["kv_cache_usage", "step", "engine"]
    steps = trace.steps(columns=names)
    assert steps.dtype.names == ("kv_cache_usage", "step", "engine")
    for name in names:
        assert steps[name].tobytes() == trace.steps()[name].tobytes()
    complete = trace.steps(complete=True, columns=["step"])
    assert complete["step"].tolist() == trace.steps(complete=True)["step"].tolist()
    requests = trace.requests(columns=("finish_reason",))
    assert requests["finish_reason"].tolist() == trace.requests()["finish_reason"].tolist()
    assert trace.steps(columns=[]).shape == trace.steps().shape


def test_an_unknown_column_is_an_error_that_names_near_ones(trace: kvhook.Trace):
    with pytest.raises(KvhookError, match=r"no column 'kv_cache_usag' of steps; near it are .*kv_cache_usage"):
        trace.steps(columns=["kv_cache_usag"])
    with pytest.raises(KvhookError, match=r"no column 'mm_cache_hits' of steps in this run: this vLLM has no stats of"):
        trace.steps(columns=["mm_cache_hits"])
    with pytest.raises(KvhookError, match=r"no column 'zzzz' of requests; there are engine, request, request_id"):
        trace.requests(columns=["zzzz"])


def test_a_table_of_nothing_has_its_columns(tmp_path: Path):
    trace = kvhook.open(Recording(tmp_path).path)
    assert len(trace.steps()) == len(trace.requests()) == 0
    assert trace.steps(columns=["step"]).dtype.names == ("step",)
