"""What is counted inside an engine core is the same in C and in Python, on a played core that is odd at times."""

from __future__ import annotations

import gc
import inspect
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from kvhook import _step
from kvhook.core.native import make_state
from kvhook.core.recorder import CoreRecorder
from kvhook.core.state import CoreState
from kvhook.core.steps import StepAccount
from kvhook.core_schema import CORE_STEP, CORE_STEP_FIELDS, LOOKUP, PREEMPTION
from tests.core import two_counts
from tests.core.played_core import Request, Scheduler, core_of

pytestmark = pytest.mark.skipif(_step.native is None, reason=f"no extension here: {_step.why_not}")
native: Any = _step.native


class Endless(Request):
    """It decodes on and on, and its blocks are not found again."""

    block_hashes: Any = tuple(b"%d" % i for i in range(100_000))


def decoding(batch: int) -> Scheduler:
    """A scheduler whose requests only decode from now on."""
    sched = Scheduler(1, batch * 2000 + 10, 16, batch, 4096)
    for number in range(batch):
        sched.add_request(Endless(str(number), [number] * 20, 1 << 40, 16))
    sched.update_from_output(sched.schedule())
    return sched


def record(sched: Scheduler, folder: Path, faults: list[BaseException]) -> CoreRecorder:
    core = core_of(sched)
    recorder = CoreRecorder(0, core, folder, 1 << 6, {})
    recorder.follow(core, faults.append)
    return recorder


@pytest.mark.parametrize("first", range(0, 120, 20))
def test_no_record_event_or_fault_differs(first: int):
    assert [found for seed in range(first, first + 20) for found in two_counts.differences(seed)] == []


def test_the_scenarios_have_everything_in_them(tmp_path: Path):
    played = [two_counts.play(seed, native, tmp_path) for seed in range(60)]
    kinds = Counter(row[1] for told in played for row in told.records)
    assert min(kinds[CORE_STEP] // 10, kinds[LOOKUP] // 4, kinds[PREEMPTION]) > 3
    assert sum(bool(told.faults) for told in played) > 5
    assert sum(not told.tapped for told in played) > 5
    assert sum(bool(told.events) for told in played) > 15


def test_a_step_that_only_decodes_does_not_come_to_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sched, seen = decoding(4), []
    monkeypatch.setattr(StepAccount, "_scheduled", lambda self, *_: seen.append(1))
    monkeypatch.setattr(StepAccount, "_write", lambda self, *_: seen.append(1))
    recorder = record(sched, tmp_path, [])
    for _ in range(40):
        sched.update_from_output(sched.schedule())
    assert (seen, recorder.ring.head) == ([], 40)
    sched.add_request(Endless("new", [1] * 20, 1, 16))
    sched.places += 1
    sched.schedule()
    assert seen == [1]
    recorder.stop()


def test_who_counts_is_chosen_when_the_recording_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    core = core_of(decoding(1))
    assert isinstance(make_state(core), native.CoreState)
    beyond = core._replace(expressions={**core.expressions, "budget": "[sched][0].budget"})
    assert isinstance(make_state(beyond), CoreState)  # the machine has no lists
    monkeypatch.setattr(_step, "native", None)
    assert isinstance(make_state(core), CoreState)


def test_both_know_the_same_columns_and_numbers():
    assert [field.name for field in CORE_STEP_FIELDS] == list(native.CORE_COLUMNS)
    in_python, in_c = CoreState(), native.CoreState()
    for name in set(CoreState.__slots__) - {"push", "pending"}:
        assert getattr(in_c, name) == getattr(in_python, name), name


def test_a_tap_looks_like_the_method_it_replaces(tmp_path: Path):
    sched = decoding(1)
    signature, name = inspect.signature(sched.schedule), sched.schedule.__name__
    recorder = record(sched, tmp_path, [])
    assert type(sched.schedule) is native.CoreTap
    assert (inspect.signature(sched.schedule), sched.schedule.__name__) == (signature, name)
    recorder.stop()
    assert "schedule" not in vars(sched)


def test_the_engines_own_exceptions_come_out_as_they_were(tmp_path: Path):
    sched, faults = decoding(2), list[BaseException]()
    recorder = record(sched, tmp_path, faults)
    output = sched.schedule()
    with pytest.raises(TypeError, match="unexpected"):
        sched.update_from_output(output, nothing=1)  # type: ignore[call-arg]
    with pytest.raises(AttributeError):
        sched.update_from_output(None)  # type: ignore[arg-type]
    sched.update_from_output(output)
    assert (faults, recorder.ring.head) == ([], 1)
    recorder.stop()


def test_what_is_recorded_goes_with_the_core(tmp_path: Path):
    sched = decoding(1)
    recorder = record(sched, tmp_path, [])
    sched.schedule()
    assert recorder.account() is not None
    del sched
    gc.collect()
    assert recorder.account() is None


@pytest.mark.parametrize("batch", [1, 5])
def test_no_reference_is_lost_or_kept(tmp_path: Path, batch: int):
    assert moved_references(batch, tmp_path, 3000) == []


def moved_references(batch: int, folder: Path, steps: int) -> list[str]:
    """What is referred to more often, or less, after so many steps."""
    sched, faults = decoding(batch), list[BaseException]()
    recorder = record(sched, folder, faults)
    pool = sched.kv_cache_manager.block_pool
    account: Any = recorder.account()
    watched = [None, 0, 1, sched, pool, pool.free_block_queue, account, account.state, *sched.running, sched.running]

    def play(count: int) -> None:
        for _ in range(count):
            for request in sched.running:  # it goes round in circles, so that no more memory is needed
                del request.tokens[21:]
                request.num_computed_tokens = 20
            sched.update_from_output(sched.schedule())

    play(50)
    gc.collect()
    before = [sys.getrefcount(each) for each in watched]
    play(steps)
    gc.collect()
    moved = [
        f"{each!r}: {sys.getrefcount(each) - count:+}"
        for each, count in zip(watched, before, strict=True)
        if abs(sys.getrefcount(each) - count) > max(10, steps // 4)
    ]
    recorder.stop()
    recorder.close()
    return moved + [repr(fault) for fault in faults]
