"""``kvhook demo`` as a user types it, and the commands it proposes."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kvhook
from tests.conftest import ROOT


def kvhook_command(folder: Path, environment: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "kvhook", *arguments],
        env={**environment, "PYTHONPATH": str(ROOT), "KVHOOK_DIR": str(folder / "rings")},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stderr == ""
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def said(folder: Path, engine_environment: dict[str, str], model: str) -> str:
    return kvhook_command(folder, engine_environment, "demo", "--model", model)


def test_it_writes_the_trace_that_it_names(said: str, folder: Path):
    assert "The trace is in kvhook-demo.kvh" in said
    summary = kvhook.open(folder / "kvhook-demo.kvh").summary()
    assert f"{summary.steps:,} steps" in said
    assert (summary.records_lost, summary.faults) == (0, {})


@pytest.mark.usefixtures("said")
def test_there_is_something_to_see(folder: Path):
    summary = kvhook.open(folder / "kvhook-demo.kvh").summary()
    assert (summary.prefix_cache_hits or 0) > 0
    assert (summary.kv_cache_usage_peak or 0) > 0.9
    assert (summary.num_waiting_reqs_peak or 0) + (summary.num_preempted_reqs or 0) > 0


def test_the_hit_rate_climbs(said: str):
    rates = [float(rate) for rate in re.findall(r"up to step .*? ([0-9.]+) %", said)]
    assert len(rates) > 3
    assert max(rates[1:]) > rates[0]


def test_it_is_plain_text_where_there_is_no_terminal(said: str):
    assert "\x1b" not in said
    assert "\r" not in said


def test_the_commands_it_proposes_work(said: str, folder: Path, engine_environment: dict[str, str]):
    commands = re.findall(r"^  \S*kvhook (\w+) (kvhook-demo\.kvh(?: \S+)*)  ", said, re.MULTILINE)
    assert [verb for verb, _ in commands] == ["summary", "report", "export"]
    shown, *_ = [kvhook_command(folder, engine_environment, verb, *rest.split()) for verb, rest in commands]
    assert "hit rate" in shown
    assert shown.splitlines()[0] in said
    assert "</html>" in (folder / "demo.html").read_text(encoding="utf-8")
    with (folder / "demo.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == kvhook.open(folder / "kvhook-demo.kvh").summary().steps
