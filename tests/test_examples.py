"""The examples, run as a reader runs them; what they print is checked against their traces and block arithmetic."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import kvhook
from tests.conftest import ROOT

EXAMPLES = ROOT / "examples"

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here"),
    pytest.mark.skipif(os.environ.get("VLLM_USE_V1") == "0", reason="the examples are for V1"),
]


class Ran(NamedTuple):
    output: str
    trace: kvhook.Trace

    def number(self, after: str) -> float:
        """The first number behind a text."""
        found = re.search(re.escape(after) + r"\D*?(\d[\d,]*\.?\d*)", self.output)
        assert found, f"{after!r} is not in\n{self.output}"
        return float(found[1].replace(",", ""))


def run(name: str, folder: Path) -> Ran:
    out = folder / "run.kvh"
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), "--out", str(out)],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "KVHOOK_DIR": str(folder / "rings"),
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        },
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-4000:]}"
    assert str(out) in done.stdout
    return Ran(done.stdout, kvhook.open(out))


def test_every_example_is_run_here():
    tested = {"quick_start.py", "prefix_cache.py", "cache_usage.py", "reorder.py"}
    elsewhere = {"to_opentelemetry.py"}  # needs no engine: test_export_opentelemetry.py
    assert {p.name for p in EXAMPLES.glob("*.py")} == tested | elsewhere | {"common.py"}


def test_quick_start(tmp_path: Path):
    ran = run("quick_start.py", tmp_path)
    summary = ran.trace.summary()
    assert "source:        hook" in ran.output
    assert ran.number("tokens:") == summary.num_prompt_tokens
    assert summary.num_generation_tokens == 96
    assert summary.prefix_cache_hit_rate
    assert f"hit rate:      {100 * summary.prefix_cache_hit_rate:.1f} %" in ran.output


def test_prefix_cache(tmp_path: Path):
    ran = run("prefix_cache.py", tmp_path)
    rounds = re.findall(r"round \d: +(\d+) of +(\d+) tokens hit .*; block arithmetic: (\d+)", ran.output)
    assert len(rounds) == 8
    assert all(hits == arithmetic for hits, _, arithmetic in rounds)
    on, off = (ran.trace.summary(engine) for engine in (0, 1))
    assert sum(int(hits) for hits, _, _ in rounds[:4]) == on.prefix_cache_hits
    assert on.prefix_cache_hits
    assert (off.prefix_caching, off.prefix_cache_hits, off.prefix_cache_hit_rate) == (False, 0, None)
    assert "hit rate of the rounds: none (prefix caching is off in this engine" in ran.output
    looked_up = sum(int(queries) for _, queries, _ in rounds[:4])
    assert f"hit rate of the rounds: {100 * on.prefix_cache_hits / looked_up:.1f} %" in ran.output
    computed = [int(n) for n in re.findall(r"prompt tokens computed: (\d+) of (?:\d+)", ran.output)]
    assert computed == [looked_up - on.prefix_cache_hits, looked_up]


def test_cache_usage(tmp_path: Path):
    ran = run("cache_usage.py", tmp_path)
    steps = ran.trace.steps()
    peak = int(steps["num_kv_blocks_used"].max())
    assert f"= {peak} of {steps['num_kv_blocks'][0]} blocks" in ran.output
    assert ran.number("peak, block arithmetic:") == peak
    assert ran.number("looked at it:") == len(steps)
    assert steps["num_kv_blocks_used"][-1] == ran.number("at the end:") == 0
    bars = [float(share) for share in re.findall(r"([\d.]+) %  running", ran.output)]
    assert bars[:-1] == sorted(bars[:-1]), "it rises"
    assert bars[-1] == 0
    # how many samples a second gives depends on the machine: on a quick one that before and that after the run
    samples = ran.number("times the hook,")
    seen, verdict = re.findall(r"polled at 1 Hz: .* = (\d+) blocks: (\w+)", ran.output)[0]
    assert samples < len(steps)
    assert verdict == ("missed" if int(seen) < peak else "seen")
    if samples == 2:
        assert (int(seen), verdict) == (0, "missed")


def test_reorder(tmp_path: Path):
    ran = run("reorder.py", tmp_path)
    table = {line[:23].strip(): line[23:].split() for line in ran.output.splitlines() if len(line.split()) > 2}
    own, reordered = (int(n) for n in table["hit tokens"])
    assert table["block arithmetic"] == table["hit tokens"]
    assert 0 < own < reordered
    assert own + reordered == ran.trace.summary().prefix_cache_hits
    computed = [int(n) for n in table["prompt tokens computed"]]
    assert computed == [int(p) - h for p, h in zip(table["prompt tokens"], (own, reordered), strict=True)]
    assert sorted(computed, reverse=True) == computed
