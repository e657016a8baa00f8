"""``kvhook check``: its verdicts, and that a check which should fail does."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvhook import cli
from kvhook.check import FAILED, OK, SKIPPED, Failed, Skipped, expect, run, structure
from kvhook.collector import prometheus
from tests.conftest import ROOT


def test_every_structural_check_passes(fresh: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["check"]) == 0
    *lines, verdict = capsys.readouterr().out.splitlines()
    assert verdict == f"{len(lines)} of {len(lines)} checks passed"
    assert len(lines) == len(structure.CHECKS)
    assert all(line.startswith("ok ") for line in lines)


def test_json(fresh: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["check", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["FAILED"]) == (len(structure.CHECKS), 0)


def test_a_mistake_is_found_and_the_others_are_run(
    fresh: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def last_sample(metrics: Any) -> dict[str, prometheus.Family]:
        """The mistake that scripts made: whatever sample comes last is the value."""
        families: dict[str, prometheus.Family] = {}
        for m in metrics:
            families[m.name] = prometheus.Family(m.type, [({}, m.samples[-1].value)])
        return families

    monkeypatch.setattr(structure, "from_collectors", last_sample)
    assert cli.main(["check"]) == 1
    out = capsys.readouterr().out
    assert "FAILED  Key-metric extraction" in out
    assert out.splitlines()[-1] == f"{len(structure.CHECKS) - 1} of {len(structure.CHECKS)} checks passed: FAILED"


def test_outcomes():
    def good() -> str:
        """Good."""
        return "found"

    def wrong() -> str:
        """Wrong."""
        expect("number", 1, 2)
        return ""

    def broken() -> str:
        """Broken."""
        raise ZeroDivisionError("by zero")

    def elsewhere() -> str:
        """Elsewhere."""
        raise Skipped("not here")

    assert [r[:3] for r in run([good, wrong, broken, elsewhere])] == [
        ("Good", OK, "found"),
        ("Wrong", FAILED, "number: 1 instead of 2"),
        ("Broken", FAILED, "ZeroDivisionError: by zero"),
        ("Elsewhere", SKIPPED, "not here"),
    ]
    with pytest.raises(Failed):
        expect("x", None, 0)


def test_without_vllm_the_engine_depth_says_what_to_install(
    fresh: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["check", "--engine"]) == 1
    assert "vLLM is not installed" in capsys.readouterr().err


@pytest.mark.engine
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here")
@pytest.mark.skipif(os.environ.get("VLLM_USE_V1") == "0", reason="V0 has no get_metrics() to compare with")
def test_every_inference_check_passes_on_a_real_engine(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "kvhook", "check", "--engine", "--json"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert (found["ok"], found["FAILED"], found["skipped"]) == (12, 0, 0)
