"""`benchmarks/collectors.py`: its quick run says what must be true of each way to collect, whatever the machine."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

SCRIPT = ROOT / "benchmarks" / "collectors.py"

RING = "kvhook: ring, from another process every 1 ms"
STEPS = "kvhook: session.steps()"
HOOK = 'VLLMMetricsCollector, source "hook"'
REGISTRY = 'VLLMMetricsCollector, source "prometheus_registry", every 1 s'
POLLED = {hz: f"get_metrics() at {hz} Hz" for hz in (1, 10, 100)}
LOG_LINE = "vLLM's log line, every 10 s"


def run_script(environment: dict[str, str], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    more = {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder), "KVHOOK_DIR": str(folder / "rings")}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env=environment | more,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="module")
def document(engine_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    done = run_script(engine_environment, tmp_path_factory.mktemp("collectors"), "--quick", "--json")
    assert done.returncode == 0, done.stderr[-8000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def here(document: dict[str, Any]) -> dict[str, Any]:
    part: dict[str, Any] = document["in_this_process"]
    return part


def test_the_document_says_what_was_measured_on_what(document: dict[str, Any]):
    assert {"cpu", "python", "wrapt", "wrapt_c_extension", "vllm", "device"} <= document["machine"].keys()
    assert set(document) == {"machine", "size", "in_this_process"}, "the quick run has no API server"
    assert set(document["in_this_process"]) == {"run", "ways", "noise", "only_costs"}
    assert set(document["in_this_process"]["ways"]) == {RING, STEPS, HOOK, REGISTRY, *POLLED.values(), LOG_LINE}


def test_the_run_is_worth_looking_at(here: dict[str, Any]):
    run = here["run"]
    assert run["steps"] > 500
    assert run["usage_peak"] > 0.9
    assert run["share_of_steps_within_5_points_of_the_peak"] < 0.2
    assert 0.1 < run["hit_rate"] < 0.9


def test_the_truth_is_what_vllm_counts(here: dict[str, Any]):
    assert here["run"]["truth"] == here["run"]["vllm_counters"]
    assert here["run"]["vllm_counters_agree"] is True


@pytest.mark.parametrize("way", [RING, STEPS, HOOK])
def test_kvhook_has_every_step_the_peak_and_the_hit_rate(here: dict[str, Any], way: str):
    run, seen = here["run"], here["ways"][way]
    assert seen["looks"] == seen["steps_seen"] == run["steps"]
    assert seen["usage_of_another_step"] == 0
    assert seen["peak_found"] == run["usage_peak"]
    assert seen["hit_rate_found"] == run["hit_rate"]
    assert seen["delay_ms"]["never_shown"] == 0


@pytest.mark.parametrize("way", [STEPS, HOOK])
def test_an_answer_has_all_that_had_ended_when_it_was_asked(here: dict[str, Any], way: str):
    delay = here["ways"][way]["delay_ms"]
    assert delay["asked"] > 0
    # a step ends in the engine core a little before LLMEngine.step is over, which is when it is recorded
    assert delay["steps_behind"] <= 1


def test_polling_misses_steps_and_the_slower_the_more(here: dict[str, Any]):
    steps, ways = here["run"]["steps"], here["ways"]
    assert ways[LOG_LINE]["steps_seen"] < steps
    assert ways[POLLED[1]]["steps_seen"] < ways[POLLED[10]]["steps_seen"] < ways[POLLED[100]]["steps_seen"] < steps
    for way in (REGISTRY, POLLED[1]):
        assert ways[way]["looks"] <= here["run"]["seconds"] + 2
        assert ways[way]["peak_at_any_phase"]["least"] < here["run"]["usage_peak"]


def test_costs_are_ratios_with_their_interval_and_the_noise_is_said(here: dict[str, Any]):
    for cost in (*(way["cost"] for way in here["ways"].values()), here["noise"], *here["only_costs"].values()):
        assert cost["against"] == "stats off"
        for figure in ("throughput", "step_p50"):
            mean, low, high = cost[figure]
            assert 0 < low <= mean <= high


def test_a_plot_of_no_known_kind_is_refused_before_anything_runs(engine_environment: dict[str, str], tmp_path: Path):
    if importlib.util.find_spec("matplotlib") is None:
        done = run_script(engine_environment, tmp_path, "--plot", "usage.svg")
        assert "pip install matplotlib" in done.stderr
    else:
        done = run_script(engine_environment, tmp_path, "--plot", "usage.txt")
        assert "draws .svg or .png, not .txt" in done.stderr
    assert done.returncode == 2
