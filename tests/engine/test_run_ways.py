"""``kvhook run`` on programs with a real engine: in a child that is spawned or forked, in another program, beside
plug-ins of the program's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import kvhook
from tests.conftest import ROOT
from tests.engine import vllm_here

#: Read here: a test finds none of kvhook's variables.
WANTED = os.environ.get("KVHOOK_WAYS") == "1"
pytestmark = [
    pytest.mark.skipif(not vllm_here.since(0, 16), reason="tried with 0.32"),
    pytest.mark.skipif(not WANTED, reason="six programs that each start vLLM take minutes: KVHOOK_WAYS=1 runs it"),
]


class Ended(NamedTuple):
    """A program that has ended."""

    code: int
    out: str
    err: str
    #: what the program says of its work
    results: dict[str, Any]
    #: the traces of front ends
    traces: list[Path]


Start = Callable[..., Ended]


@pytest.fixture
def start(engine_environment: dict[str, str], model: str, tmp_path: Path) -> Start:
    """Runs a program in a way, with these variables, and waits for its end."""

    def run(way: str, code: int, path: Path | None = None, **variables: str) -> Ended:
        results = tmp_path / "results.json"
        paths = [str(path)] * (path is not None) + [str(ROOT), engine_environment.get("PYTHONPATH", "")]
        done = subprocess.run(
            [
                *(sys.executable, "-m", "kvhook", "run", "--trace", tmp_path / "run.kvh", "--", sys.executable, "-m"),
                *("tests.engine.run_ways", way, model, results, str(code)),
            ],
            env={**engine_environment, "KVHOOK_DIR": str(tmp_path / "rings"), "PYTHONPATH": ":".join(paths)}
            | variables,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert results.exists(), done.stderr[-8000:]
        traces = [p for p in sorted(tmp_path.glob("run*.kvh")) if ".core" not in p.name]
        return Ended(done.returncode, done.stdout, done.stderr, json.loads(results.read_text()), traces)

    return run


def check_whole(ended: Ended, code: int) -> Any:
    """The exit code and the output are the program's, the summary is printed, and all of the work is in one trace."""
    assert (ended.code, ended.out.splitlines()[-1]) == (code, "the script's own output"), ended.err[-4000:]
    (path,) = ended.traces
    assert f"recorded in {path}" in ended.err
    prompts, generated = (sum(one[what] for one in ended.results["done"]) for what in (0, 1))
    assert f"{generated:,} tokens" in ended.err
    trace = kvhook.open(path)
    steps, requests = trace.steps(), trace.requests()
    assert (steps["num_prompt_tokens"].sum(), steps["num_generation_tokens"].sum()) == (prompts, generated)
    assert sorted(requests["num_generation_tokens"].tolist()) == sorted(one[1] for one in ended.results["done"])
    assert (trace.meta["records_lost"], trace.meta["damaged"]) == (0, 0)
    assert trace.meta["engines"][0]["pid"] == ended.results["pid"]
    lived = trace.cores().requests()
    assert sorted(lived["num_prompt_tokens"].tolist()) == sorted(one[0] for one in ended.results["done"])
    assert "num_kv_blocks_peak" in (steps.dtype.names or ())
    return trace


@pytest.mark.parametrize("way", ["spawn", "fork", "exec"])
def test_an_engine_is_recorded_wherever_the_program_makes_it(start: Start, way: str):
    ended = start(way, 3, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    trace = check_whole(ended, 3)
    assert [facts["pid"] for facts in trace.cores().facts] == [ended.results["pid"]]


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    """A plug-in of the program's own for vLLM: a package called ``mine``, installed in a folder of the path."""
    place = tmp_path / "packages"
    about = place / "mine-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[vllm.general_plugins]\nmine = mine:load\n")
    (place / "mine.py").write_text("import os\n\n\ndef load():\n    os.environ['MY_PLUGIN'] = 'loaded'\n")
    return place


@pytest.mark.parametrize("restricted", [{}, {"VLLM_PLUGINS": "mine,kvhook"}])
def test_plug_ins_of_the_program_s_own_are_loaded_beside_kvhook(start: Start, plugin: Path, restricted: dict[str, str]):
    ended = start("here", 0, path=plugin, **restricted, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    assert ended.results["plugin"] == "loaded"
    check_whole(ended, 0)


def test_a_program_that_restricts_plug_ins_to_its_own_is_told_how_to_allow_kvhook(start: Start, plugin: Path):
    ended = start("here", 4, path=plugin, VLLM_PLUGINS="mine", VLLM_ENABLE_V1_MULTIPROCESSING="0")
    assert (ended.code, ended.results["plugin"], ended.traces) == (4, "loaded", [])
    assert "VLLM_PLUGINS=mine,kvhook" in ended.err
    assert "nothing was recorded" in ended.err
