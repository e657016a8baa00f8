"""A run in windows, against numpy over the same numbers, and against what is exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvhook
from kvhook.analysis.windows import NUMBERS
from kvhook.cli import main
from kvhook.errors import KvhookError
from kvhook.text.bar import sparkline
from kvhook.text.windows import as_text
from tests.ring.synthetic import MS, Recording

STEPS = 300


def invented(folder: Path, seed: int) -> tuple[kvhook.Trace, list[dict[str, Any]]]:
    """A random run, and what each of its steps brought."""
    rng = np.random.default_rng(seed)
    recording = Recording(folder, slots=4096)
    begun = recording.clock
    told = []
    for step in range(STEPS):
        values = rng.uniform(0.001, 0.1, rng.choice([0, 1, 2, 5])).tolist()
        first = rng.uniform(0.1, 1.0, rng.choice([0, 0, 1])).tolist()
        finished = [float(x) for x in rng.uniform(1, 9, rng.choice([0, 0, 2]))]
        for e2e in finished:
            recording.finish(step, e2e_latency=e2e)
        if len(values) > 2:
            recording.values_of(step, values)
        queries = int(rng.choice([0, 0, 160]))
        numbers = {
            "num_running_reqs": int(rng.integers(9)),
            "num_waiting_reqs": int(rng.integers(3)),
            "num_generation_tokens": len(values),
            "num_prompt_tokens": queries,
            "num_preempted_reqs": int(rng.random() < 0.1),
            "prefix_cache_queries": queries,
            "prefix_cache_hits": int(rng.integers(10)) * 16 if queries else 0,
        }
        usage = float(rng.integers(101)) / 100
        latencies = {
            f"{prefix}_{what}": reduce(some)
            for prefix, some in (("itl", values), ("ttft", first))
            for what, reduce in (("count", len), ("sum", sum), ("min", min), ("max", max))
            if some or what == "count"
        }
        took = float(rng.exponential(10)) + 0.1
        recording.step(usage, took_ms=took, **numbers, **latencies)
        end = recording.clock - begun
        told.append(
            numbers
            | {"usage": usage, "itl": values, "ttft": first, "e2e": finished, "end": end, "took": int(took * MS)}
        )
    return kvhook.open(recording.path), told


def expected(told: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The numbers of each window, by numpy."""
    whole = told[-1]["end"]
    out = []
    for window in range(count):
        rows = [r for r in told if whole * window < r["end"] * count <= whole * (window + 1)]
        total = {n: sum(r[n] for r in rows) for n in rows[0] if isinstance(rows[0][n], int)}
        seconds = total["took"] / 1e9
        found: dict[str, Any] = {
            "steps": len(rows),
            "kv_cache_usage_mean": np.mean([r["usage"] for r in rows]),
            "kv_cache_usage_peak": max(r["usage"] for r in rows),
            "num_running_reqs_mean": np.mean([r["num_running_reqs"] for r in rows]),
            "num_waiting_reqs_mean": np.mean([r["num_waiting_reqs"] for r in rows]),
            "prefix_cache_hit_rate": total["prefix_cache_hits"] / total["prefix_cache_queries"],
            "prompt_tokens_per_second": total["num_prompt_tokens"] / seconds,
            "generation_tokens_per_second": total["num_generation_tokens"] / seconds,
            "num_preempted_reqs": total["num_preempted_reqs"],
            "num_finished_reqs": sum(len(r["e2e"]) for r in rows),
        }
        times = {"step_time": [r["took"] / 1e9 for r in rows]}
        for name, key in (("time_to_first_token", "ttft"), ("inter_token_latency", "itl"), ("e2e_latency", "e2e")):
            times[name] = [v for r in rows for v in r[key]]
        for number in NUMBERS:
            name, _, share = number.name.rpartition("_p")
            if name in times:
                found[number.name] = np.percentile(times[name], int(share))
        out.append(found)
    return out


@pytest.mark.parametrize(("seed", "count"), [(1, 1), (2, 3), (3, 7)])
def test_every_number_of_every_window_is_what_numpy_says(tmp_path: Path, seed: int, count: int):
    trace, told = invented(tmp_path, seed)
    found = trace.windows(count).as_dict()
    wanted = expected(told, count)
    for mine, theirs in zip(found, wanted, strict=True):
        assert {n.name for n in NUMBERS} == set(theirs)
        for name, value in theirs.items():
            assert mine[name] == pytest.approx(value, rel=1e-6), name


def test_windows_are_what_an_export_gives(tmp_path: Path):
    trace, _ = invented(tmp_path / "run", 4)
    (path,) = trace.dump(tmp_path / "run.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [row for row in rows if "t_start_ns" in row]
    assert len(steps) == STEPS
    begin, end = steps[0]["t_start_ns"], steps[-1]["t_end_ns"]
    windows = trace.windows(5)
    for i in range(5):
        inside = [s for s in steps if (end - begin) * i < 5 * (s["t_end_ns"] - begin) <= (end - begin) * (i + 1)]
        hits, queries = (sum(s[f"prefix_cache_{what}"] for s in inside) for what in ("hits", "queries"))
        assert windows.numbers["steps"][i] == len(inside)
        assert windows.numbers["prefix_cache_hit_rate"][i] == hits / queries


def test_one_window_is_the_summary(tmp_path: Path):
    trace, _ = invented(tmp_path, 5)
    summary = trace.summary()
    (window,) = trace.windows(1).as_dict()
    for number in NUMBERS:
        assert window[number.name] == number.read(summary), number.name


def test_a_session_has_the_same_windows_as_its_trace(fresh: Path):
    from tests.standin import fake_vllm, step_stats

    with fake_vllm() as vllm, kvhook.install(trace=fresh / "run.kvh") as session:
        engine = vllm.engine()
        engine.plan += [step_stats(generated=n) for n in range(20)]
        for _ in range(20):
            engine.step()
        so_far = session.windows(4).as_dict()
    assert sum(w["steps"] for w in so_far) == 20
    assert kvhook.open(fresh / "run.kvh").windows(4).as_dict() == so_far


def test_engines_that_lived_one_after_the_other_have_windows_of_their_own(tmp_path: Path):
    first = Recording(tmp_path / "first").run(10)
    second = Recording(tmp_path / "second")
    second.clock = first.clock
    second.run(10)
    both = kvhook.open(first.path, second.path)
    assert both.windows(2).numbers["steps"].tolist() == [10, 10]
    assert both.windows(2, engine=1).numbers["steps"].tolist() == [5, 5]


def test_a_window_in_which_nothing_happened_knows_nothing(tmp_path: Path):
    recording = Recording(tmp_path).run(5)
    recording.clock += 1000 * MS
    recording.run(5)
    windows = kvhook.open(recording.path).windows(10)
    assert windows.numbers["steps"][0] == windows.numbers["steps"][-1] == 5
    empty = windows.as_dict()[4]
    assert (empty["steps"], empty["num_preempted_reqs"], empty["num_finished_reqs"]) == (0, 0, 0)
    assert empty["kv_cache_usage_mean"] is None
    assert empty["step_time_p50"] is None


def test_runs_without_steps_have_no_windows(tmp_path: Path):
    windows = kvhook.open(Recording(tmp_path / "empty").path).windows(5)
    assert len(windows) == 0
    assert str(windows) == "no steps, no windows"
    one = kvhook.open(Recording(tmp_path / "one").run(1).path).windows(3)
    assert np.nansum(one.numbers["steps"]) == 1


@pytest.mark.parametrize("count", [0, -1, 1001])
def test_a_number_of_windows_that_makes_no_sense_is_refused(tmp_path: Path, count: int):
    with pytest.raises(KvhookError, match="1 to 1,000 windows"):
        kvhook.open(Recording(tmp_path).run(3).path).windows(count)


def test_a_picture_goes_from_0_to_the_top():
    assert sparkline([0, 0.5, 1, float("nan"), 2], 1.0) == "▁▅█ █"
    assert sparkline([0, 1], 1.0, ascii_only=True) == "_#"
    assert sparkline([0, 0], 0.0) == "▁▁"


def test_no_peak_is_hidden_where_windows_share_a_character(tmp_path: Path):
    recording = Recording(tmp_path, slots=1024)
    for step in range(600):
        recording.step(1.0 if step == 333 else 0.1)
    text = as_text(kvhook.open(recording.path).windows(600))
    line = next(line for line in text.splitlines() if "KV usage peak" in line)
    assert line.count("█") == 1
    assert "100.0 %" in line


def test_the_command_line_shows_windows_after_the_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    trace, _ = invented(tmp_path, 6)
    assert main(["summary", trace.name, "--windows", "6"]) == 0
    shown = capsys.readouterr().out
    assert shown == f"{trace.summary()}\n\n{trace.windows(6)}\n"
    assert max(map(len, shown.splitlines())) <= 120
    assert main(["summary", trace.name, "--windows", "6", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["windows"] == trace.windows(6).as_dict()


def test_a_terminal_without_unicode_gets_ascii(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    trace, _ = invented(tmp_path, 7)
    assert as_text(trace.windows(6), ascii_only=True).isascii()
    assert "\x1b" not in as_text(trace.windows(6))  # nothing is coloured
