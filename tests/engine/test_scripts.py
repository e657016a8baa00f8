"""Scripts that were written for another collector of the same name, on a real engine, which they make themselves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kvhook
from kvhook import VLLMMetricsCollector
from kvhook.analysis.blocks import prefix_hits
from tests.conftest import ROOT
from tests.engine.conftest import MakeLLM
from tests.script_checks import Inference, as_an_experiment_reads
from tests.workloads import BLOCK_SIZE

FOUR = ["basic_collection", "hit_rate_progression", "usage_progression", "every_method"]


pytestmark = pytest.mark.usefixtures("nothing_installed")


def counters(llm: Any) -> dict[str, int]:
    """vLLM's own counters; empty where it refuses to give them."""
    found: dict[str, int] = {}
    try:
        for metric in llm.get_metrics():
            if type(metric).__name__ == "Counter":
                found[metric.name] = found.get(metric.name, 0) + metric.value
    except AssertionError:
        pass
    return found


class Script:
    """All four checks, one after the other, and what the engine itself says afterwards."""

    def __init__(self, llm: Any) -> None:
        from vllm import SamplingParams  # type: ignore[import-not-found, unused-ignore]

        self.prompts: list[list[int]] = []

        def generate(prompts: list[str]) -> list[Any]:
            answers = llm.generate(prompts, SamplingParams(max_tokens=8, temperature=0.8, top_p=0.95), use_tqdm=False)
            self.prompts += [list(one.prompt_token_ids) for one in answers]
            return list(answers)

        script = Inference(VLLMMetricsCollector, llm, generate)
        self.passed = {check.__name__: check() for check in script.checks()}
        self.seen = script.seen
        self.experiment = as_an_experiment_reads(script.collector)
        self.counters = counters(llm)
        script.collector.close()

    @property
    def hits(self) -> list[int]:
        """The tokens that each prompt finds, by block arithmetic."""
        return list(prefix_hits(self.prompts, BLOCK_SIZE))


@pytest.fixture(scope="module", params=["script alone", "kvhook.install() before the engine"])
def script(request: pytest.FixtureRequest, make_llm: MakeLLM) -> Script:
    kvhook.uninstall()
    if request.param != "script alone":
        kvhook.install()
    return Script(make_llm(disable_log_stats=False))


@pytest.mark.parametrize("check", FOUR)
def test_a_scripts_check_around_generate_passes(script: Script, check: str):
    assert script.passed[check]


def test_its_hit_rates_are_the_block_arithmetic(script: Script):
    progression, final = script.seen["hit rates"]
    hits, lengths = script.hits[:6], [len(prompt) for prompt in script.prompts[:6]]
    # the first prompt is that of the check before
    expected = [100 * sum(hits[: n + 2]) / sum(lengths[: n + 2]) for n in range(5)]
    assert progression == pytest.approx(expected)
    assert expected[-1] > 0
    assert final is not None


def test_the_registrys_reading_is_vllms_own(script: Script):
    registry = script.seen["methods"][0]["registry"]
    assert (registry["collection_method"], registry["stats_available"]) == ("prometheus_registry", True)
    for name in ("vllm:prompt_tokens", "vllm:generation_tokens", "vllm:prefix_cache_queries", "vllm:prefix_cache_hits"):
        assert registry["metrics_found"][f"{name}_total"] == script.counters[name]
    assert registry["total_histograms_found"] == len(registry["histogram_data"]) > 0
    assert "error" not in registry


def test_what_an_experiment_reads_by_the_names_of_vllms_metrics(script: Script):
    found = script.experiment
    assert found["vllm:prompt_tokens_total"] == sum(map(len, script.prompts))
    assert found["vllm:gpu_prefix_cache_hits"] == sum(script.hits)
    assert found["vllm:gpu_prefix_cache_hit_rate"] == pytest.approx(
        sum(script.hits) / sum(map(len, script.prompts)), abs=1e-6
    )
    assert (found["vllm:gpu_cache_usage_perc"], found["vllm:num_requests_running"]) == (0, 0)
    assert found["vllm:time_to_first_token_seconds"] > 0


def test_with_vllms_stats_off_it_gets_to_its_end(make_llm: MakeLLM):
    script = Script(make_llm())
    # the scheduler is in this process: its states are known, and nothing is counted
    assert script.passed == dict.fromkeys(FOUR, True)
    assert script.seen["hit rates"] == ([None] * 5, None)
    registry = script.seen["methods"][0]["registry"]
    assert (registry["stats_available"], registry["metrics_found"]) == (False, {})
    assert registry["error"]
    assert script.experiment == {}


def test_with_prefix_caching_off_there_is_no_rate_to_stumble_over(make_llm: MakeLLM):
    script = Script(make_llm(disable_log_stats=False, enable_prefix_caching=False))
    assert script.passed == dict.fromkeys(FOUR, True)
    assert script.seen["hit rates"][1] is None


OWN_PROCESS = """
import json, sys
from pathlib import Path
from tests.engine.test_scripts import Script
from vllm import LLM
from tests.engine import vllm_here

if __name__ == "__main__":
    llm = LLM(model=sys.argv[1], **vllm_here.options() | {"disable_log_stats": sys.argv[2] == "off"})
    script = Script(llm)
    registry = script.seen["methods"][0]["registry"]
    said = json.dumps([script.passed, registry["stats_available"], script.seen["hit rates"]])
    Path(sys.argv[3]).write_text(said, encoding="utf-8")
"""


@pytest.mark.parametrize("stats", ["on", "off"])
def test_with_the_engine_core_in_its_own_process(
    stats: str, engine_environment: dict[str, str], model: str, tmp_path: Path
):
    program, said = tmp_path / "script.py", tmp_path / "said.json"
    program.write_text(OWN_PROCESS, encoding="utf-8")
    more = {"PYTHONPATH": str(ROOT), "KVHOOK_DIR": str(tmp_path / "rings"), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    done = subprocess.run(
        [sys.executable, str(program), model, stats, str(said)],
        env={**engine_environment, **more},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed, registry, (progression, final) = json.loads(said.read_text(encoding="utf-8"))
    if stats == "on":
        assert passed == dict.fromkeys(FOUR, True)
        assert registry
        assert final == progression[-1] > 0
    else:
        # nothing can be seen of such an engine that was made without kvhook: no check ends in an exception
        assert passed == dict.fromkeys(FOUR, False) | {"hit_rate_progression": True}
        assert (registry, progression, final) == (False, [None] * 5, None)
