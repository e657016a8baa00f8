"""Whatever goes wrong at a seam inside the engine core, the core does what it does without kvhook.

The core is played (`tests/core/played_core.py`). The seams are the functions that the adapter gives to kvhook, and the
methods of kvhook's that its taps call; both lists are taken from the code.
"""

from __future__ import annotations

import contextlib
import inspect
import types
from pathlib import Path
from typing import Any

import pytest

from kvhook import _step
from kvhook.core.lookups import Lookups
from kvhook.core.pool import PoolAccount
from kvhook.core.preemptions import Preemptions
from kvhook.core.process import CoreProcess
from kvhook.core.recorder import CoreRecorder
from kvhook.core.steps import StepAccount
from kvhook.core.writer import Writer
from tests.core.played_core import Request, Scheduler, core_of
from tests.faults.odd import BEHAVIOURS, CONTAINED, PASSED_ON, Unprintable, odd_function

STEPS = 60


def scheduler() -> Scheduler:
    """A pool that is too small: requests are preempted, and blocks evicted."""
    sched = Scheduler(3, 14, 4, 4, 24)
    for number in range(9):
        sched.add_request(Request(str(number), [number % 3] * (5 + 3 * number), 6, 4))
    return sched


def run(sched: Scheduler, reset: bool = True) -> list[Any]:
    """What the scheduler gives, step by step."""
    given: list[Any] = []
    for step in range(STEPS):
        output = sched.schedule()
        given.append(sorted(output.tokens.items()))
        sched.update_from_output(output)
        if reset and step == 30:
            sched.kv_cache_manager.block_pool.reset_prefix_cache()
        if step == 20:
            sched.add_request(Request("late", [1] * 30, 3, 4))
    return [given, len(sched.requests)]


EXPECTED = run(scheduler())


def own_functions() -> list[tuple[type, str]]:
    """Methods of kvhook's that work while the core does."""
    found: list[tuple[type, str]] = []
    classes: tuple[type, ...] = (StepAccount, PoolAccount, Lookups, Preemptions, Writer)
    for cls in classes:
        for name, method in vars(cls).items():
            began_before = name.startswith(("__", "_on_")) or name in ("tap", "parts", "stop", "contained")
            if inspect.isfunction(method) and not began_before:
                found.append((cls, name))
    return found


#: They say that something has failed, or are what the others are contained by.
NOT_SEAMS = {"_watch_preemption", "_free_before", "_is_preempted", "_forget", "_look", "_know"}
FUNCTIONS = [each for each in own_functions() if each[1] not in NOT_SEAMS]


def record(sched: Scheduler, folder: Path, faults: list[BaseException], core: Any = None) -> CoreRecorder:
    core = core or core_of(sched)
    recorder = CoreRecorder(0, core, folder, 1 << 8, {})
    recorder.follow(core, faults.append)
    return recorder


def test_the_scenario_has_everything_in_it():
    sched = scheduler()
    preempted: list[Any] = []
    preempt = sched._preempt_request

    def noted(request: Any, when: float) -> None:
        preempted.append(request)
        preempt(request, when)

    vars(sched)["_preempt_request"] = noted
    assert run(sched) == EXPECTED
    assert preempted
    assert EXPECTED[1] == 0, "all requests have ended"


@pytest.mark.parametrize("behaviour", ["Exception", "BaseException", "MemoryError", "RecursionError"])
def test_whatever_a_function_of_kvhooks_raises_the_core_does_the_same(
    behaviour: str, both_paths: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    failed = set()
    for cls, name in FUNCTIONS:
        faults: list[BaseException] = []
        with pytest.MonkeyPatch.context() as patch:
            sched = scheduler()
            recorder = None
            if name not in ("take",):
                real = vars(cls)[name]
                recorder = record(sched, tmp_path, faults)
                recorder.stop()
                sched, faults = scheduler(), []
                patch.setattr(cls, name, odd_function(real, behaviour))
            try:
                recorder = record(sched, tmp_path, faults)
            except BaseException as error:  # it fails where the recording begins, which `CoreProcess.attach` contains
                assert type(error) is type(CONTAINED[behaviour]()), name  # noqa: PT017
                assert run(sched) == EXPECTED, name
                continue
            assert run(sched) == EXPECTED, (cls.__name__, name)
        assert len(faults) <= 1, "it is taken out at the first error"
        if faults:
            failed.add(name)
            assert type(faults[0]) is type(CONTAINED[behaviour]())
            assert "schedule" not in vars(sched), "nothing of kvhook's is left"
        recorder.ring.close()
    assert len(failed) > 8, failed


@pytest.mark.parametrize("name", sorted(core_of(scheduler()).reads))
def test_whatever_the_core_says_when_it_is_read_it_does_the_same(name: str, tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(_step, "native", None)  # the extension reads the objects itself
    for behaviour in BEHAVIOURS:
        if behaviour in PASSED_ON or behaviour == "blocks":
            continue
        sched, faults = scheduler(), list[BaseException]()
        core: Any = core_of(sched)
        act = list[Any]()  # empty at first: a core that could never be read is not recorded at all

        def read(*args: Any, real: Any = core.reads[name], act: Any = act) -> Any:
            return act[0](real(*args)) if act else real(*args)

        core.reads[name] = read
        recorder = record(sched, tmp_path, faults, core)
        act.append(BEHAVIOURS[behaviour])
        assert run(sched) == EXPECTED, behaviour
        assert len(faults) <= 1
        with contextlib.suppress(Exception):  # what is left cannot be packed; `CoreProcess.end` counts it
            recorder.stop()
        recorder.close()


def test_an_error_that_cannot_be_printed_is_told_all_the_same():
    process, due = CoreProcess(), list[int]()
    recorder: Any = types.SimpleNamespace(meta={})
    spool = types.SimpleNamespace(write_meta_again=due.append)
    process._recorded[0] = [(recorder, spool, "core")]  # type: ignore[list-item]
    process._failed(0, Unprintable())
    assert process.faults.counts == {"counting inside the engine core": 1}
    assert recorder.meta["failed"] == process.faults.first_errors["counting inside the engine core"]
    assert due == [0]
