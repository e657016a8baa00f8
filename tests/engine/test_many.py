"""Many real engines, one after the other in one process: nothing of kvhook's stays but what is told of them.

KVHOOK_MANY_ENGINES=200 makes so many, instead of 3, after three others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

#: vLLM itself, torch and kvhook load what they need with the first engines.
WARM = 3
COUNT = int(os.environ.get("KVHOOK_MANY_ENGINES") or 3)
#: Rings of engines that are gone are kept, for `kvhook recover`: 16 when a new one is made, and that one.
KEPT_RINGS = 17
#: What the process may grow by for each engine, beyond what it grows by without kvhook.
KB_EACH = 700


def made(mode: str, model: str, folder: Path, environment: dict[str, str]) -> Any:
    """The engines, with kvhook or without it."""
    command = [sys.executable, "-m", "tests.engine.many", mode, model, str(WARM + COUNT), str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_many_engines_leave_nothing_behind(model: str, engine_environment: dict[str, str], tmp_path: Path):
    environment = engine_environment | {"PYTHONPATH": str(ROOT)}
    seen = made("with", model, tmp_path, environment)
    bare = made("without", model, tmp_path / "bare", environment)
    assert seen["given"] == bare["given"], "the outputs are the same"
    assert (seen["engines"], seen["requests"], seen["wrong"]) == (WARM + COUNT, 3 * (WARM + COUNT), [])
    first, last = seen["states"][WARM - 1], seen["states"][-1]
    assert [state["rings"] for state in seen["states"]] == [min(n + 1, KEPT_RINGS) for n in range(WARM + COUNT)]
    assert last["maps of rings"] == first["maps of rings"] == 0
    for what in ("descriptors", "threads"):
        # what vLLM leaves behind is vLLM's
        left = bare["states"][-1][what] - bare["states"][WARM - 1][what]
        assert last[what] - first[what] <= left, what
    # what is told of an engine stays: one recording, with the columns of its records, and nothing of what works
    grown = {name: n - first["objects"].get(name, 0) for name, n in last["objects"].items()}
    columns = grown.pop("kvhook.ring.layout.Column")
    assert {name: n for name, n in grown.items() if n not in (0, COUNT)} == {}
    assert columns + sum(grown.values()) < 120 * COUNT, grown
    kb, without = (each["states"][-1]["kb"] - each["states"][WARM - 1]["kb"] for each in (seen, bare))
    assert kb - without < KB_EACH * COUNT, f"{kb} KB more, and {without} KB without kvhook"
