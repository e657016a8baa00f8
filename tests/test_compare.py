"""``kvhook compare``: verdicts on runs that are simulated step by step, and how they are shown."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvhook
from kvhook.analysis.compare import BETTER, NOT_JUDGED, SAME, UNCLEAR, WORSE, Comparison, Row, Side, compare
from kvhook.analysis.series import QUANTILES, RATIOS, measure
from kvhook.analysis.settings import settings_of
from kvhook.cli import main
from kvhook.text.compare import as_markdown, as_text
from tests.ring.synthetic import Recording

DATA = Path(__file__).parent / "data"
STEPS = 240


def simulated(
    folder: Path, seed: int, *, slower: float = 1.0, hits: float = 0.5, steps: int = STEPS, **facts: Any
) -> kvhook.Trace:
    """A run whose steps depend on each other: a load that comes and goes moves all of its numbers."""
    rng = np.random.default_rng(seed)
    recording = Recording(folder / str(seed), slots=2048, **facts)
    load = 0.0
    for step in range(steps):
        load = 0.8 * load + rng.normal()
        running = int(np.clip(8 + 2 * load, 1, 20))
        latency = 0.01 * slower * np.exp(0.1 * load + 0.05 * rng.normal())
        queries = 64 * int(rng.poisson(2))
        recording.finish(
            step,
            num_prompt_tokens=64,
            num_cached_tokens=32,
            e2e_latency=float(latency * (50 + 5 * load)),
            time_to_first_token=float(latency),
        )
        recording.step(
            float(np.clip(0.5 + 0.05 * load, 0, 1)),
            took_ms=float(1000 * latency),
            num_running_reqs=running,
            num_waiting_reqs=int(max(0, load)),
            num_generation_tokens=running,
            num_prompt_tokens=queries,
            prefix_cache_queries=queries,
            prefix_cache_hits=int(rng.binomial(queries // 16, hits)) * 16,
            itl_count=running,
            itl_sum=running * latency,
            itl_min=latency,
            itl_max=latency,
            ttft_count=1,
            ttft_sum=3 * latency,
            ttft_min=3 * latency,
            ttft_max=3 * latency,
        )
    return kvhook.open(recording.path)


def sides(*runs: kvhook.Trace | list[kvhook.Trace]) -> list[Side]:
    out = []
    for letter, given in zip("ABCDEF", runs, strict=False):
        repeats = given if isinstance(given, list) else [given]
        settings = settings_of(engine for run in repeats for engine in run.meta["engines"])
        out.append(Side(letter, letter, [measure(run) for run in repeats], settings))
    return out


def row(c: Comparison, name: str) -> Row:
    (found,) = (r for r in c.rows if r.name == name)
    return found


def verdict(c: Comparison, name: str, place: int = 0) -> str:
    return row(c, name).contrasts[place].verdict


# What is measured


def test_each_number_is_the_summary_s_and_its_steps_add_up_to_it(tmp_path: Path):
    run = simulated(tmp_path, 1)
    measured = measure(run)
    summary = run.summary()
    assert measured.summary.as_dict() == summary.as_dict()
    for name in RATIOS:
        spread = measured.spreads[name]
        assert not isinstance(spread, str), (name, spread)
        assert spread.estimate == pytest.approx(getattr(summary, name)), name
    for name in QUANTILES:
        spread = measured.spreads[name]
        of, _, share = name.rpartition("_")
        if not isinstance(spread, str):
            assert spread.estimate == pytest.approx(getattr(getattr(summary, of), share)), name
        else:
            assert share == "p99", name


def test_latencies_that_are_lists_of_their_own_are_counted_in_their_steps(tmp_path: Path):
    from kvhook.analysis.series import _steps_of, up_to

    rng = np.random.default_rng(3)
    recording = Recording(tmp_path, slots=4096)
    expected = []
    for step in range(100):
        values = rng.uniform(0.001, 0.1, rng.integers(0, 9)).tolist()
        if len(values) > 2:
            recording.values_of(step, values)
        extremes = {"itl_min": min(values), "itl_max": max(values)} if values else {}
        recording.step(itl_count=len(values), itl_sum=sum(values), **extremes)
        expected.append(sum(v <= 0.05 for v in values))
    trace = kvhook.open(recording.path)
    steps = _steps_of(trace)
    assert up_to(0.05, "inter_token_latency", trace, steps).tolist() == expected


# Verdicts


def test_runs_without_a_difference_get_no_verdict(tmp_path: Path):
    """Sixteen tables: one of them may hold a verdict."""
    runs = [measure(simulated(tmp_path, seed)) for seed in range(17)]
    with_verdict = 0
    for first, second in itertools.pairwise(runs):
        found = compare([Side("A", "a", [first], {}), Side("B", "b", [second], {})])
        judged = [r.contrasts[0].verdict for r in found.rows if r.contrasts[0].low is not None]
        assert len(judged) >= 10
        with_verdict += any(v not in (UNCLEAR, SAME) for v in judged)
    assert with_verdict <= 2


def test_real_differences_are_found_and_said_to_be_good_or_bad(tmp_path: Path):
    c = compare(sides(simulated(tmp_path, 1), simulated(tmp_path, 2, slower=1.6, hits=0.65)))
    assert verdict(c, "prefix_cache_hit_rate") == BETTER
    for name in ("step_time_p50", "inter_token_latency_p50", "time_to_first_token_p50", "generation_tokens_per_second"):
        assert verdict(c, name) == WORSE, name
    for name in ("kv_cache_usage_mean", "num_running_reqs_mean", "num_waiting_reqs_mean"):
        assert verdict(c, name) == UNCLEAR, name
    contrast = row(c, "prefix_cache_hit_rate").contrasts[0]
    assert contrast.low is not None
    assert contrast.high is not None
    assert contrast.difference is not None
    assert 0 < contrast.low < contrast.difference < contrast.high < 0.35


def test_what_cannot_be_judged_says_why(tmp_path: Path):
    c = compare(sides(simulated(tmp_path, 1), simulated(tmp_path, 2, steps=10)))
    for name, why in (("steps", "what was done"), ("num_running_reqs_peak", "largest"), ("step_time_p50", "few")):
        contrast = row(c, name).contrasts[0]
        assert contrast.verdict in (NOT_JUDGED, SAME)
        assert contrast.verdict == SAME or why in contrast.why


def test_a_run_is_the_same_as_itself(tmp_path: Path):
    run = simulated(tmp_path, 1)
    c = compare(sides(run, run))
    assert {r.contrasts[0].verdict for r in c.rows} == {SAME, NOT_JUDGED}


def test_repeats_that_differ_take_a_verdict_back(tmp_path: Path):
    """The same difference stands out of each run's steps, but not of repeats that differ by as much."""
    plain, slow, fast, other = (
        simulated(tmp_path, seed, slower=slower) for seed, slower in ((1, 1.0), (2, 1.7), (3, 0.6), (4, 1.6))
    )
    assert verdict(compare(sides(plain, other)), "step_time_p50") == WORSE
    assert verdict(compare(sides([plain, slow, fast], other)), "step_time_p50") == UNCLEAR
    same = [simulated(tmp_path, seed) for seed in (11, 12, 13)]
    assert verdict(compare(sides(same, other)), "step_time_p50") == WORSE


def test_three_runs_are_each_compared_with_the_first(tmp_path: Path):
    c = compare(sides(simulated(tmp_path, 1), simulated(tmp_path, 2), simulated(tmp_path, 3, slower=2)))
    assert [verdict(c, "step_time_p50", place) for place in (0, 1)] == [UNCLEAR, WORSE]
    text = as_text(c)
    assert "B / A" in text
    assert "C / A" in text


def test_settings_that_differ_are_named(tmp_path: Path):
    first = simulated(tmp_path, 1, max_num_seqs=8, max_num_batched_tokens=2048, steps=20)
    second = simulated(tmp_path, 2, max_num_seqs=16, max_num_batched_tokens=2048, kv_cache_dtype="fp8", steps=20)
    c = compare(sides(first, second))
    assert [(s.name, s.values) for s in c.settings] == [("max_num_seqs", ((8,), (16,)))]
    assert "max_num_seqs" in as_text(c)
    assert "A 8, B 16" in as_text(c)


def test_what_must_be_known_before_one_believes_it_is_said(tmp_path: Path):
    first, second = simulated(tmp_path, 1), simulated(tmp_path, 2, steps=STEPS // 2, vllm="0.10.0")
    notes = " ".join(compare(sides(first, second)).notes)
    assert "did not do the same work" in notes
    assert "counts prefix-cache look-ups differently" in notes
    assert "only repeats can show" in notes
    assert "only repeats" not in " ".join(compare(sides([first, first], second)).notes)


# How it is shown


def test_the_command_line_prints_text_json_and_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    a, b = (simulated(tmp_path, seed, slower=s).name for seed, s in ((1, 1.0), (2, 1.5)))
    assert main(["compare", a, b]) == 0
    assert "B is worse (" in capsys.readouterr().out
    assert main(["compare", a, b, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    rows = {r["name"]: r for r in shown["rows"]}
    assert rows["step_time_p50"]["contrasts"][0]["verdict"] == WORSE
    summary = kvhook.open(a).summary()
    assert rows["step_time_p50"]["values"][0] == summary.step_time.p50
    assert rows["prefix_cache_hit_rate"]["values"][0] == summary.prefix_cache_hit_rate
    assert main(["compare", a, b, "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in table} == {7}


def test_the_same_command_prints_the_same_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    a, b = (simulated(tmp_path, seed).name for seed in (1, 2))
    printed = []
    for _ in range(2):
        main(["compare", a, b])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]


def test_names_cannot_break_out_of_markdown(tmp_path: Path):
    recording = Recording(tmp_path / "a|b<img src=x>", model="evil|<script>alert(1)</script>`*").run(30)
    c = compare(sides(kvhook.open(recording.path), simulated(tmp_path, 2)))
    text = as_markdown(c)
    assert "<script" not in text.replace("\\<", "")
    assert "evil\\|" in text or "alert" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["A"], "two runs at least"),
        (["A", "nowhere.kvh"], "cannot open nowhere.kvh"),
        (["A", ","], "names no file"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    run = str(DATA / "engine-0.32.0-full.kvh")
    assert main(["compare", *(run if a == "A" else a for a in arguments)]) == 1
    assert message in capsys.readouterr().err


def test_runs_with_nothing_in_them_can_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    empty, one = Recording(tmp_path / "empty"), Recording(tmp_path / "one").run(1)
    silent = Recording(tmp_path / "silent")
    for _ in range(30):
        silent.step(float("nan"), has_scheduler_stats=0, num_running_reqs=-1, num_waiting_reqs=-1)
    assert main(["compare", *(str(r.path) for r in (one, empty, silent))]) == 0
    assert main(["compare", *(str(r.path) for r in (empty, one)), "--json"]) == 0
    assert "nan" not in capsys.readouterr().out.lower()
