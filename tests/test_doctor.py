"""`kvhook doctor` on stand-ins for several releases: what is there, what is absent and why, and the exit code."""

from __future__ import annotations

import json

import pytest

from kvhook import doctor
from kvhook.cli import main
from tests.conftest import Python
from tests.contracts.loader import build_stub_modules, load, stubs


@pytest.fixture(autouse=True)
def _no_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-ins are in `sys.modules`; there is nothing to be imported."""
    monkeypatch.setattr(doctor, "_import_vllm", lambda problems: None)


def examine(release: str, *, use_v1: bool = True) -> doctor.Diagnosis:
    with stubs(build_stub_modules(load(release), use_v1=use_v1)):
        return doctor.examine()


def test_a_known_release_is_recorded_and_every_target_found():
    found = examine("0.32.0")
    assert found.vllm == "0.32.0"
    assert not found.problems
    engine = next(e for e in found.engines if e.engine == "vllm.v1.engine.llm_engine:LLMEngine")
    assert all(t.found for t in engine.targets)
    assert {"kv_cache_usage", "prefix_cache_hits", "ttft_sum"} <= set(engine.live["step"])
    assert engine.absent["step"]["num_evicted_blocks_sampled"] == "needs kv_cache_metrics=True"


def test_an_older_release_says_what_it_does_not_count():
    found = examine("0.9.2")
    engine = next(e for e in found.engines if e.engine == "vllm.v1.engine.llm_engine:LLMEngine")
    assert "re-admitted" in engine.absent["step"]["prefix_cache_preempted_hits"]
    assert "num_cached_tokens" in engine.absent["request"]


def test_a_missing_target_is_a_problem_that_names_it():
    modules = build_stub_modules(load("0.32.0"), use_v1=True)
    del modules["vllm.v1.engine.llm_engine"].LLMEngine.step
    with stubs(modules):
        found = doctor.examine()
    assert any("LLMEngine.step" in problem for problem in found.problems)


def test_without_vllm_it_says_so_and_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(doctor, "_import_vllm", lambda problems: problems.append("vLLM is not installed"))
    assert main(["doctor"]) == 1
    assert "PROBLEM: vLLM is not installed" in capsys.readouterr().out


def test_json_is_the_whole_diagnosis(capsys: pytest.CaptureFixture[str]):
    with stubs(build_stub_modules(load("0.32.0"), use_v1=True)):
        assert main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["engines"][0]["live"]["step"]
    assert told["ring_directory"]


def test_source_prints_the_code_of_the_step_path(capsys: pytest.CaptureFixture[str]):
    with stubs(build_stub_modules(load("0.32.0"), use_v1=True)):
        main(["doctor", "--source"])
    assert "def publish(t_start_ns, t_end_ns):" in capsys.readouterr().out


@pytest.mark.parametrize("wanted", ["", "1"])
def test_it_says_which_step_path_records_and_why(python: Python, wanted: str):
    told = json.loads(python("from kvhook.cli import main\nmain(['doctor', '--json'])", KVHOOK_PURE=wanted).stdout)
    notes = [note for note in told["notes"] if "the step path runs in Python" in note]
    if wanted:
        assert told["step_path"] == "python"
        assert "KVHOOK_PURE is set" in notes[0]
    else:
        assert (told["step_path"] == "c") == (not notes)
