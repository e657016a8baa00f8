"""A real engine is killed in mid-generation: what was published is in the ring, the trace can be completed from it.

KVHOOK_KILLS=5 kills five instead of two: an engine takes a quarter of a minute to start.
"""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import kvhook
from kvhook.analysis.autopsy import examine
from kvhook.cli import main
from kvhook.discovery.rings import DEAD, find_rings
from tests.conftest import ROOT
from tests.engine.killed import ROW

ROW_TYPE = np.dtype([("start", "<i8"), ("end", "<i8"), ("tokens", "<i8"), ("usage", "<f8")])
assert ROW_TYPE.itemsize == ROW.size
KILLS = int(os.environ.get("KVHOOK_KILLS", "2"))


@pytest.mark.parametrize("kill", range(KILLS))
def test_killed_in_mid_generation(
    kill: int, engine_environment: dict[str, str], model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    trace, witness, rings, log = (tmp_path / name for name in ("run.kvh", "witness", "rings", "log"))
    with log.open("w") as out:
        child = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("killed.py")), model, str(trace), str(witness)],
            env={**engine_environment, "PYTHONPATH": str(ROOT), "KVHOOK_DIR": str(rings)},
            cwd=tmp_path,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        until = time.monotonic() + 300
        while told(witness) < 40 + 30 * kill:
            assert child.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < until, log.read_text()[-4000:]
            time.sleep(0.01)
        time.sleep(random.Random(kill).random() * 0.3)
    finally:
        child.kill()
        child.wait()

    rows = np.frombuffer(witness.read_bytes(), ROW_TYPE, told(witness), 8)
    (ring,) = find_rings([rings])
    assert (ring.state, ring.pid) == (DEAD, child.pid)
    left = kvhook.open(ring.path)
    check(left.steps(), rows)

    # the trace ends with the last time that the spool came; what is missing is in the ring
    cut = len(kvhook.open(trace).steps())
    assert main(["recover", str(trace), "--dir", str(rings)]) == 0
    whole = kvhook.open(trace)
    assert len(whole.steps()) >= len(rows) >= cut
    check(whole.steps(), rows)
    assert whole.summary().records_lost == 0
    assert len(whole.requests()) == len(left.requests())

    autopsy = examine(left, "killed")
    assert autopsy.still_running is not None
    assert autopsy.still_running > 0, "it was killed while requests were running"
    assert main(["autopsy", "--dir", str(rings)]) == 0
    said = capsys.readouterr().out
    assert "it was killed" in said
    assert f"{autopsy.still_running} running" in said
    print(f"kill {kill}: {len(rows)} steps published, {cut} in the trace before recover, {len(whole.steps())} after")


def told(witness: Path) -> int:
    """How many rows the witness has."""
    try:
        with witness.open("rb") as file:
            return int(struct.unpack("<Q", file.read(8))[0])
    except (OSError, struct.error):
        return 0


def check(steps: np.ndarray, rows: np.ndarray) -> None:
    """Every step whose publish had returned is there, and holds what the engine gave."""
    assert len(rows) <= len(steps) <= len(rows) + 1
    assert steps["step"].tolist() == list(range(len(steps)))
    steps = steps[: len(rows)]
    assert (steps["t_start_ns"] == rows["start"]).all()
    assert (steps["t_end_ns"] == rows["end"]).all()
    assert (steps["num_generation_tokens"] == rows["tokens"]).all()
    assert np.array_equal(steps["kv_cache_usage"], rows["usage"], equal_nan=True)
