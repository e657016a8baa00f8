"""Traces that an earlier kvhook recorded open, and the numbers are those that it printed then."""

from __future__ import annotations

import doctest
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import kvhook
import kvhook.records.tables
import kvhook.trace

DATA = Path(__file__).parent / "data"
TRACES = sorted(DATA.glob("*.kvh"))


def test_there_are_traces_of_an_engine_and_of_a_script():
    assert {path.stem for path in TRACES} >= {"engine-0.32.0-full", "engine-0.32.0-light", "scripted-sparse"}


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_the_summary_has_the_numbers_that_it_had(path: Path):
    then: dict[str, Any] = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    now = kvhook.open(path).summary().as_dict()
    assert {name: rounded(now[name]) for name in then} == rounded(then)


def rounded(value: Any) -> Any:
    """Floats to 14 digits: sums are rounded once now, and were rounded in each addition then."""
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.14g}") if isinstance(value, float) else value


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_a_copy_is_the_same_run(path: Path, tmp_path: Path):
    trace = kvhook.open(path)
    (copy,) = trace.dump(tmp_path / "copy.kvh")
    again = kvhook.open(copy)
    assert again.steps().tobytes() == trace.steps().tobytes()
    assert again.requests().tobytes() == trace.requests().tobytes()
    assert again.meta["engines"] == trace.meta["engines"]


def test_the_full_run_is_there_step_by_step():
    trace = kvhook.open(DATA / "engine-0.32.0-full.kvh")
    steps, requests = trace.steps(), trace.requests()
    assert (len(steps), len(requests), trace.meta["records"]) == (56, 12, 71)
    assert steps["num_prompt_tokens"].sum() == 3 * (64 + 8) + 3 * (64 + 12) + 6 * 60
    assert steps["num_generation_tokens"].sum() == 3 * 8 + 3 * 8 + 6 * 20
    assert steps["num_preempted_reqs"].sum() == 2
    assert sorted(requests["num_generation_tokens"].tolist()) == [8] * 6 + [20] * 6
    _, counts = trace.latencies("time_to_first_token")
    assert counts.sum() == 12


def test_at_level_light_the_tokens_are_the_same_and_requests_are_not_known():
    full, light = (kvhook.open(DATA / f"engine-0.32.0-{level}.kvh") for level in ("full", "light"))
    for name in ("num_prompt_tokens", "num_generation_tokens", "prefix_cache_hits", "num_preempted_reqs"):
        assert light.steps()[name].tolist() == full.steps()[name].tolist(), name
    assert len(light.requests()) == 0
    assert light.summary().num_finished_reqs == 12


def test_the_scripted_run_says_when_its_level_changed():
    trace = kvhook.open(DATA / "scripted-sparse.kvh")
    assert trace.summary().steps_by_level == {"full": 1, "light": 8, "sparse": 31}
    (engine,) = trace.meta["engines"]
    assert [(c["step"], c["level"]) for c in engine["levels"]][1:] == [
        (1, "light"),
        (9, "sparse"),
        (17, "sparse"),
        (25, "sparse"),
    ]


@pytest.mark.parametrize("module", [kvhook.records.tables, kvhook.trace], ids=["tables", "trace"])
def test_the_examples_in_the_docstrings_show_what_is_printed(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.copy(DATA / "engine-0.32.0-full.kvh", tmp_path / "run.kvh")
    shutil.copy(DATA / "engine-0.32.0-light.kvh", tmp_path / "light.kvh")
    monkeypatch.chdir(tmp_path)
    failed, tried = doctest.testmod(module, extraglobs={"kvhook": kvhook}, optionflags=doctest.ELLIPSIS)
    assert tried > 5
    assert failed == 0
