"""``kvhook check --engine`` on the real engine: as a user types it, and inside of a process that has done other things.

Each in a process of its own: when vLLM deletes an engine it takes down what the others in the process need, and those
of the other engine tests would be among them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvhook.check import FAILED, OK, structure
from tests.conftest import ROOT

ON_ENGINE = [
    *("engine_starts", "recorded", "basic_collection", "hit_rate_progression", "usage_progression"),
    *("methods_agree", "histograms_agree", "accounts_balance", "cost"),
]


def python(folder: Path, environment: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs a Python whose temporary files and rings are in this folder."""
    temporary = folder / "tmp"
    temporary.mkdir()
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**environment, "PYTHONPATH": str(ROOT), "KVHOOK_DIR": str(folder / "rings"), "TMPDIR": str(temporary)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def quiet(engine_environment: dict[str, str]) -> dict[str, str]:
    """Without what the checks set by themselves."""
    return {n: v for n, v in engine_environment.items() if n not in ("VLLM_LOGGING_LEVEL", "VLLM_LOG_STATS_INTERVAL")}


def test_as_a_user_types_it(tmp_path: Path, quiet: dict[str, str]):
    done = python(tmp_path, quiet, "-m", "kvhook", "check", "--engine")
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, verdict = done.stdout.splitlines()
    count = len(structure.CHECKS) + len(ON_ENGINE)
    assert verdict == f"passed: {count} of {count} checks"
    assert len(lines) == count
    assert all(line.startswith("ok ") for line in lines)
    assert done.stderr == ""
    assert "24 of 255 blocks, the block arithmetic" in done.stdout
    # with asynchronous scheduling, on a GPU, vLLM's own counters miss look-ups in some releases
    assert "10 of 10 values" in done.stdout or "vLLM's own counters missed" in done.stdout
    left = [p for p in (tmp_path / "tmp").rglob("*") if "kvhook" in p.name]
    assert not left, "nothing is left behind"
    assert not list((tmp_path / "rings").glob("*"))


@pytest.fixture(scope="module")
def in_process(tmp_path_factory: pytest.TempPathFactory, quiet: dict[str, str], model: str) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("checked")
    done = python(folder, quiet, Path(__file__).with_name("checked.py"), model, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


def outcomes(said: dict[str, Any]) -> dict[str, str]:
    return {one["name"]: one["outcome"] for one in said["checks"]}


@pytest.mark.parametrize("when", ["beside", "alone"])
def test_it_passes_in_a_process_that_has_done_other_things(in_process: dict[str, Any], when: str):
    assert outcomes(in_process[when]) == dict.fromkeys(ON_ENGINE, OK), in_process[when]["checks"]


def test_a_session_that_was_there_stays(in_process: dict[str, Any]):
    beside = in_process["beside"]
    assert beside["session_is_the_same"]
    assert beside["engines"] == 1, "the user's own"
    assert in_process["steps_before"] > 0


@pytest.mark.parametrize("when", ["alone", "faulty"])
def test_nothing_is_left_behind(in_process: dict[str, Any], when: str):
    left = in_process[when]
    assert not left["installed"]
    assert left["patched"] == []
    assert left["engines"] == 0
    assert left["metrics"] == []
    assert left["environment_changed"] == []
    assert set(left["rings"]) <= set(in_process["beside"]["rings"]), "of the user's session alone, which is kept"


def test_planted_faults_are_found_on_the_real_engine(in_process: dict[str, Any]):
    found = outcomes(in_process["faulty"])
    failed = {name for name, outcome in found.items() if outcome == FAILED}
    assert failed == {"hit_rate_progression", "methods_agree", "histograms_agree"}
    texts = {one["name"]: one for one in in_process["faulty"]["checks"]}
    assert texts["hit_rate_progression"]["seen"] == "[1.0, 1.0, 1.0, 1.0]"
    assert "OSError: planted" in texts["methods_agree"]["seen"]
    assert texts["methods_agree"]["expected"] == "numbers"
    assert all(texts[name]["advice"] for name in failed)
