"""``kvhook check`` of its own structure: what it says when all is well, and that each check fails on its fault."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import kvhook
from kvhook import check, cli
from kvhook import faults as guard
from kvhook.check import FAILED, OK, SKIPPED, Failed, Skipped, expect, run, structure
from kvhook.collector import VLLMMetricsCollector, about, answer, chain, names, prometheus, reading, sources
from kvhook.collector.reading import Reading
from kvhook.errors import KvhookError
from tests.conftest import Python
from tests.standin import fake_vllm

NAMES = [one.__name__ for one in structure.CHECKS]


# The runner


def test_outcomes():
    def good() -> str:
        """Good."""
        return "found"

    def wrong() -> str:
        """Wrong.

        This line is for readers of the code.
        """
        expect("a number", 1, 2, "count again")
        return ""

    def broken() -> str:
        """Broken."""
        raise ZeroDivisionError("by zero")

    def elsewhere() -> str:
        """Elsewhere."""
        raise Skipped("not here")

    results = list(run([good, wrong, broken, elsewhere]))
    assert [(r.name, r.title, r.outcome) for r in results] == [
        ("good", "Good", OK),
        ("wrong", "Wrong", FAILED),
        ("broken", "Broken", FAILED),
        ("elsewhere", "Elsewhere", SKIPPED),
    ]
    assert results[1].found == "a number: expected 2, saw 1. To do: count again"
    assert (results[1].expected, results[1].seen, results[1].advice) == ("2", "1", "count again")
    assert "ZeroDivisionError: by zero" in results[2].seen
    assert results[2].advice == check.REPORT
    assert check.verdict(results) == "FAILED: 2 of 4 checks (Wrong, Broken), 1 skipped"
    assert check.verdict([results[0], results[3]]) == "passed: 1 of 2 checks, 1 skipped"


def test_failed_and_skipped_are_no_errors_of_the_user():
    assert not issubclass(Failed, KvhookError)
    assert not issubclass(Skipped, KvhookError)


# When all is well


def test_one_line_for_each_check_and_a_verdict(fresh: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["check"]) == 0
    said = capsys.readouterr()
    *lines, verdict = said.out.splitlines()
    assert verdict == f"passed: {len(NAMES)} of {len(NAMES)} checks"
    assert len(lines) == len(NAMES)
    assert all(line.startswith("ok ") for line in lines)
    assert said.err == "", "what is provoked is not shown"


def test_json(fresh: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["check", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in found["checks"]] == NAMES
    assert {one["outcome"] for one in found["checks"]} == {OK}
    assert found["verdict"].startswith("passed")


def test_what_an_engine_left_in_this_process_does_not_matter(
    fresh: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """A session, an engine that is recorded, and metrics of another in the process's one Prometheus registry."""
    sample = types.SimpleNamespace(name="vllm:num_requests_running", labels={}, value=3.0)
    metric = types.SimpleNamespace(name=sample.name, type="gauge", samples=[sample])
    client = types.SimpleNamespace(REGISTRY=types.SimpleNamespace(collect=lambda: [metric]))
    monkeypatch.setitem(sys.modules, "prometheus_client", client)
    assert VLLMMetricsCollector().collect_current_stats()["collection_method"] == names.REGISTRY
    with fake_vllm() as vllm:
        session = kvhook.install()
        engine = vllm.engine()
        assert cli.main(["check"]) == 0
        assert kvhook.recording.installation.current_session() is session
        del engine
    assert kvhook.recording.installation.current_session() is session


HIDDEN = """
import importlib.util, sys
class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("vllm", "torch", "prometheus_client"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "vllm" else find_spec(name, *more)
sys.meta_path.insert(0, NotInstalled())
from kvhook.cli import main
print("exit code", main(sys.argv[1:]))
"""


def test_without_vllm_the_structure_is_checked(python: Python):
    done = python(HIDDEN, "check")
    *lines, verdict, code = done.stdout.splitlines()
    assert (len(lines), verdict, code) == (len(NAMES), f"passed: {len(NAMES)} of {len(NAMES)} checks", "exit code 0")
    assert done.stderr == ""


@pytest.mark.parametrize("arguments", [["--engine"], ["--model", "some/model"]])
def test_without_vllm_an_engine_is_a_failed_check_that_says_what_to_install(
    arguments: list[str], python: Python, tmp_path: Path
):
    done = python(HIDDEN, "check", *arguments, TMPDIR=str(tmp_path))
    *_, line, verdict, code = done.stdout.splitlines()
    assert line.startswith("FAILED  The engine starts")
    assert "vLLM is not installed" in line
    assert "pip install vllm" in line
    assert (verdict, code) == (f"FAILED: 1 of {len(NAMES) + 1} checks (The engine starts)", "exit code 1")
    assert not list(tmp_path.glob("kvhook-check-*"))


# With a fault in kvhook


def _last_sample(metrics: Any) -> dict[str, prometheus.Family]:
    """The mistake that scripts made: whatever sample comes last is the value, whatever type the metric is of."""
    return {m.name: prometheus.Family("counter", [({}, m.samples[-1].value)]) for m in metrics}


def _never_stops(self: Any) -> None:
    if self._times._periods:
        self._times._periods[-1][1] = 0.0


def _raises(*_: object, **__: object) -> Any:
    raise RuntimeError("planted")


def _zeros(self: Any) -> Reading:
    return Reading(self.name, {"num_running_reqs": 0}, {}, {}, {}, None, "")


#: Check -> what is put where, so that it has to fail. Others may fail with it.
FAULTS: dict[str, tuple[Any, str, Any]] = {
    "imports": (kvhook, "__all__", [*kvhook.__all__, "no_such_name"]),
    "methods": (VLLMMetricsCollector, "save_metrics", None),
    "unavailable": (sources.EngineSource, "read", _zeros),
    "strange_objects": (about, "plain_fact", _raises),
    "errors": (guard.Faults, "fault", lambda *_: None),
    "fallback": (chain.SourceChain, "_warn_once", lambda *_: None),
    "key_metrics": (answer, "KEYS", tuple(k._replace(factor=1) for k in names.KEYS)),
    "no_false_hit_rate": (prometheus, "from_collectors", _last_sample),
    "lifecycle": (VLLMMetricsCollector, "stop_monitoring", _never_stops),
    "saving": (VLLMMetricsCollector, "get_metrics_history", lambda _: []),
}


def test_there_is_a_fault_for_every_check():
    assert list(FAULTS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_fault_is_found(name: str, fresh: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(*FAULTS[name])
    assert cli.main(["check", "--json"]) == 1
    monkeypatch.undo()
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)["checks"]}
    assert list(found) == NAMES, "the others are made as well"
    one = found[name]
    assert one["outcome"] == FAILED
    assert one["expected"] != one["seen"]
    assert one["found"].endswith(f"expected {one['expected']}, saw {one['seen']}. To do: {one['advice']}")
    assert sum(other["outcome"] == OK for other in found.values()) > len(NAMES) / 2, "it is told where"


def test_a_hit_rate_of_100_percent_that_is_none_is_found(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reading, "hit_rate", lambda *_: (1.0, ""))
    results = {r.name: r for r in run(structure.CHECKS)}
    assert (results["key_metrics"].expected, results["key_metrics"].seen) == ("0.25", "1.0")
    assert results["no_false_hit_rate"].outcome == FAILED


def test_an_import_that_brings_more_than_it_says_is_found(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    done = types.SimpleNamespace(returncode=0, stdout="numpy torch\n", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    (result,) = run([structure.imports])
    assert (result.outcome, result.seen) == (FAILED, "['numpy', 'torch']")


def test_an_import_that_fails_in_a_fresh_python_is_found(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    done = types.SimpleNamespace(returncode=1, stdout="", stderr="Traceback\nSyntaxError: planted\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    (result,) = run([structure.imports])
    assert (result.outcome, result.seen) == (FAILED, "SyntaxError: planted")
