"""Engine cores in processes of their own, spawned and forked, ending well or killed: the session reads them all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.entry_point import make_known

#: What vLLM does in the process of an engine core: load the plug-ins, import the scheduler, build it, and work.
CHILD = """
import json, multiprocessing, os, random, signal, sys
import kvhook

def child(model, end):
    from vllm.plugins import load_general_plugins
    load_general_plugins()
    from tests.core.scheduler_here import Driver
    driver = Driver(model, blocks=30, max_num_seqs=8, max_num_batched_tokens=96, max_model_len=512)
    rng = random.Random(3)
    for _ in range(15):
        driver.add([rng.randrange(2, 500) for _ in range(rng.randrange(5, 100))], max_tokens=rng.randrange(1, 60))
    for _ in driver.run():
        pass
    with open("seen.json", "w") as file:
        json.dump([output.total_num_scheduled_tokens for output in driver.outputs], file)
    if end == "killed":
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    model, method, end, trace = sys.argv[1:]
    if method == "fork":
        import vllm.v1.core.sched.scheduler, vllm.v1.engine.core
    session = kvhook.install(trace=trace or None, core="blocks")
    process = multiprocessing.get_context(method).Process(target=child, args=(model, end))
    process.start()
    process.join()
    steps, cores = session.core_steps(), session.cores()
    print(json.dumps({
        "code": process.exitcode,
        "tokens": steps["num_scheduled_tokens"].tolist(),
        "pids": [facts["pid"] for facts in cores.facts],
        "child": process.pid,
        "why_none": cores.why_none,
        "lost": cores.lost,
        "allocated": [
            int((session.blocks()["event"] == "allocate").sum()), int(steps["num_kv_blocks_allocated"].sum())
        ],
        "faults": session.faults,
    }))
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    """A folder that makes kvhook's entry point known, as an installed package does."""
    return make_known(tmp_path / "plugin")


def run(tmp_path: Path, *arguments: str, path: Path | None = None) -> dict[str, Any]:
    script = tmp_path / "script.py"  # a spawned process imports it again, by its name
    script.write_text(CHILD)
    done = subprocess.run(
        [sys.executable, script, *arguments],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, [ROOT, *([path] if path else [])])),
            "KVHOOK_DIR": str(tmp_path / "rings"),
            "VLLM_LOGGING_LEVEL": "ERROR",
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,  # vLLM is imported twice, which takes a minute where others use the machine
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    found["seen"] = json.loads((tmp_path / "seen.json").read_text())
    return found


@pytest.mark.parametrize("end", ["well", "killed"])
@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_what_an_engine_core_of_its_own_process_did_is_in_the_session(
    core_model: str, driver: Any, tmp_path: Path, plugin: Path, method: str, end: str
):
    trace = str(tmp_path / "run.kvh") if end == "well" else ""
    found = run(tmp_path, core_model, method, end, trace, path=plugin)
    assert found["code"] == (0 if end == "well" else -9)
    assert found["tokens"] == found["seen"]
    assert found["pids"] == [found["child"]]
    assert found["lost"] == 0
    assert found["allocated"][0] == found["allocated"][1] > 0
    assert found["faults"] == {}


def test_a_spawned_core_that_vllm_does_not_load_kvhook_in_is_absent_with_its_reason(
    core_model: str, driver: Any, tmp_path: Path
):
    found = run(tmp_path, core_model, "spawn", "well", "")
    if not found["pids"]:  # in an environment with kvhook installed as a package, vLLM does load it
        assert found["tokens"] == []
        assert "pip install kvhook" in found["why_none"]
