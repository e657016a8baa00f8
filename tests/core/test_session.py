"""A session records the schedulers that are built while it is installed, into files beside its trace."""

from __future__ import annotations

import gc
import json
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kvhook
from kvhook.cli import main
from kvhook.core.plan import VARIABLE, CorePlan, read_plan
from kvhook.core.process import process
from kvhook.errors import KvhookError
from kvhook.export.mooncake import write
from tests.faults.long_run import is_trace

#: Makes a scheduler of vLLM's, and what drives it.
Build = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("fresh")


@pytest.fixture
def build(core_model: str, driver: Any) -> Build:
    from tests.core.scheduler_here import Driver

    def make(**settings: Any) -> Any:
        usual = {"blocks": 30, "max_num_seqs": 8, "max_num_batched_tokens": 96, "max_model_len": 512}
        return Driver(core_model, **{**usual, **settings})

    return make


def work(driver: Any, requests: int = 20) -> None:
    rng = random.Random(1)
    stem = [rng.randrange(2, 500) for _ in range(60)]
    for _ in range(requests):
        tail = [rng.randrange(2, 500) for _ in range(rng.randrange(5, 100))]
        driver.add(stem + tail if rng.random() < 0.5 else tail, max_tokens=rng.randrange(1, 60))
    list(driver.run())


def spools() -> list[str]:
    """The threads that write traces, and the traces that are open."""
    traces = [f"trace {fd}" for fd in os.listdir("/proc/self/fd") if is_trace(int(fd))]
    return [t.name for t in threading.enumerate() if t.name == "kvhook-spool"] + traces


def test_an_engine_core_that_is_gone_leaves_no_thread_and_no_open_file(build: Build, tmp_path: Path):
    """vLLM shuts down an engine core in this process when its engine is deleted; older releases only drop it."""
    build()  # what fails in the first one is kept by vLLM, and all that it can see
    with kvhook.install(trace=tmp_path / "run.kvh", core="blocks") as session:
        for number in range(3):
            before = spools()  # the session's own thread is begun when it is read
            driver = build()
            work(driver, 4)
            assert len(spools()) == len(before) + 4  # of the steps and of the ledger
            del driver
            give_up = time.monotonic() + 60
            while spools() != before or process._recorded:
                assert time.monotonic() < give_up, spools()
                gc.collect()
            assert session.health().ok
            assert len(session.cores()) == number + 1
            assert len(session.core_requests()) == 4 * (number + 1)
        steps = session.core_steps()
        assert len(session.cores().blocks()) > 0
        assert session.cores().lost == 0
    # the session is closed, and its files have everything
    assert session.core_steps().tolist() == steps.tolist()


def test_a_scheduler_built_after_install_is_recorded(build: Build, tmp_path: Path):
    session = kvhook.install(trace=tmp_path / "run.kvh", core="steps")
    driver = build()
    work(driver)
    steps = session.core_steps()
    assert len(steps) == len(driver.outputs)
    assert steps["num_scheduled_tokens"].sum() == sum(o.total_num_scheduled_tokens for o in driver.outputs)
    assert len(session.core_requests()) == 20
    assert len(session.preemptions()) == steps["num_preempted_reqs"].sum() > 0
    assert session.cores().why_none == ""
    assert session.cores().lost == 0
    assert session.faults == {}
    (facts,) = session.cores().facts
    assert facts["num_kv_blocks"] == 29
    assert facts["pid"] == os.getpid()


def test_uninstall_takes_everything_out_and_what_was_recorded_can_still_be_read(build: Build, tmp_path: Path):
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore

    before = Scheduler.__init__, EngineCore.shutdown
    session = kvhook.install(trace=tmp_path / "run.kvh", core="steps")
    assert Scheduler.__init__ is not before[0]
    driver = build()
    work(driver, 5)
    count = len(session.core_steps())
    kvhook.uninstall()
    assert (Scheduler.__init__, EngineCore.shutdown) == before
    assert not [
        name for name in vars(driver.scheduler) if callable(vars(driver.scheduler)[name]) and name == "schedule"
    ]
    work(driver, 5)
    assert len(session.core_steps()) == count
    assert VARIABLE not in os.environ


def test_two_schedulers_are_two_cores(build: Build):
    session = kvhook.install(core="steps")
    for requests in (3, 7):
        work(build(), requests)
    assert len(session.cores()) == 2
    assert [len(session.core_requests(core)) for core in (0, 1)] == [3, 7]
    assert session.core_requests()["core"].tolist() == [0] * 3 + [1] * 7


def test_requests_of_two_front_ends_are_told_apart_and_counted_together(build: Build, tmp_path: Path):
    """Two API servers send requests to one core: each has its number, and no step is taken for that of one of them."""
    session = kvhook.install(trace=tmp_path / "run.kvh", core="steps")
    driver = build()
    for number in range(6):
        driver.add([number + 2] * 20, max_tokens=2, client_index=number % 2)
    list(driver.run())
    requests = session.core_requests()
    assert sorted(requests["request"].tolist()) == list(range(6))
    assert (requests["client_index"] == requests["request"] % 2).all()
    assert len(set(requests["request_key"].tolist())) == 6
    assert session.core_steps()["num_finished_reqs"].sum() == 6


def test_exported_requests_have_the_name_of_the_recording(build: Build, tmp_path: Path):
    session = kvhook.install(trace=tmp_path / "run.kvh", core="blocks")
    work(build(), 4)
    kvhook.uninstall()
    # there is no trace of a front end that could be named
    write(session.trace().block_requests(), tmp_path / "requests.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    assert {line["session"] for line in lines} == {session.cores().facts[0]["session"]}
    assert not [line for line in lines if "label" in line or "session_id" in line]


def test_off_means_that_nothing_is_done(build: Build):
    from vllm.v1.core.sched.scheduler import Scheduler

    before = Scheduler.__init__
    session = kvhook.install(core="off")
    assert Scheduler.__init__ is before
    driver = build()
    assert "schedule" not in vars(driver.scheduler)
    assert VARIABLE not in os.environ
    assert "core='off'" in session.cores().why_none
    assert len(session.core_steps()) == 0


def test_a_level_that_is_none_is_refused():
    with pytest.raises(KvhookError, match="core='all'"):
        kvhook.install(core="all")


def test_the_trace_finds_its_cores_and_a_folder_is_opened_without_them(build: Build, tmp_path: Path, capsys: Any):
    session = kvhook.install(trace=tmp_path / "run.kvh", core="blocks")
    work(build())
    kvhook.uninstall()
    files = sorted(p.name for p in tmp_path.glob("*.kvh"))
    assert files == [f"run.blocks0-{os.getpid()}.kvh", f"run.core0-{os.getpid()}.kvh"]
    with pytest.raises(KvhookError, match="open the trace beside it"):
        kvhook.open(tmp_path / files[1])
    with pytest.raises(KvhookError, match=r"no \.kvh file"):
        kvhook.open(tmp_path)
    assert main(["cache", str(tmp_path / "run.kvh"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    steps = session.core_steps()
    assert found["num_steps"] == len(steps)
    assert found["num_recomputed_tokens"] == steps["num_recomputed_tokens"].sum() > 0
    assert found["num_kv_blocks_peak"] == steps["num_kv_blocks_peak"].max()
    assert found["num_evicted_blocks"] == (session.blocks()["event"] == "evict").sum() > 0
    assert sum(found["limited_by"].values()) == len(steps)
    assert found["blocks"]["shared_prefixes"][0][1] == 48  # the stem's whole blocks of 16
    assert main(["cache", str(tmp_path / "run.kvh")]) == 0
    page = capsys.readouterr().out
    assert "of the work was done twice" in page
    assert "48 tokens in" in page


def test_a_trace_without_cores_says_so(tmp_path: Path, capsys: Any):
    assert main(["cache", str(tmp_path / "run.kvh")]) == 1
    assert "no files of engine cores beside" in capsys.readouterr().err


def test_a_plan_is_carried_out_by_its_maker_and_the_workers_it_starts_and_by_nobody_else(
    monkeypatch: pytest.MonkeyPatch,
):
    plan = CorePlan("steps", "/rings", 64, "/run", None, "s", "00", os.getpid())
    plan.publish()
    assert read_plan() == plan
    assert plan.is_meant_for_this_process()
    other = CorePlan("steps", "/rings", 64, "/run", None, "s", "00", os.getpid() + 1)
    assert not other.is_meant_for_this_process()
    other.withdraw()
    assert read_plan() == plan
    plan.withdraw()
    assert read_plan() is None
    monkeypatch.setenv(VARIABLE, "{not json")
    assert read_plan() is None


def test_the_plug_in_does_nothing_and_imports_nothing_without_a_plan(python: Any):
    code = """
import sys
from kvhook.plugin import load
before = set(sys.modules)
load()
assert set(sys.modules) == before
assert not {"wrapt", "numpy", "vllm"} & before
"""
    python(code)
