"""What ``kvhook top`` says of a run whose beginning it did not see, of its first seconds, and after its end."""

from __future__ import annotations

import re
import time
from pathlib import Path

import numpy as np
import pytest

from kvhook.analysis.live import Live
from kvhook.discovery.watch import Watch
from kvhook.ring.reader import RingReader
from kvhook.text.live import detail
from tests.ring.synthetic import Recording
from tests.watched import NOW, Core, busy, watched


def finishing(recording: Recording, count: int) -> Recording:
    """So many steps of 10 ms; in each a request finishes, in each second one the prefix cache hits."""
    for n in range(count):
        recording.finish(n)
        recording.step(
            num_finished_reqs=1,
            num_aborted_reqs=n == 0,
            num_preempted_reqs=1,
            num_generation_tokens=5,
            prefix_cache_queries=10,
            prefix_cache_hits=10 * (n % 2),
        )
    return recording


@pytest.mark.parametrize(("behind", "seen"), [(0, 32), (1, 31)])
def test_what_the_ring_no_longer_holds_is_not_taken_for_the_run_s(tmp_path: Path, behind: int, seen: int):
    """The ring holds 63 records: it begins with a step whose request is gone, or with the request."""
    recording = finishing(Recording(tmp_path, slots=64), 1000)
    for _ in range(behind):
        recording.finish(1)  # its step has not ended
    (view,) = watched(tmp_path, now_ns=recording.clock)
    assert (view.steps, view.finished_all) == (1000, 1000)
    assert (view.finished_run, view.preempted_run, view.aborted_run) == (seen, seen, 0)
    assert view.since == pytest.approx(time.time(), abs=600)
    assert view.steps_rate == pytest.approx(seen)  # of a second: the least time
    sums = [line for line in detail(view, 80) if line.startswith("this run")]
    assert re.fullmatch(rf"this run    1,000 finished; since [\d:]+: 0 aborted, {seen} preempted", sums[0])


def test_where_some_requests_have_no_record_it_is_not_known_how_many_finished_before(tmp_path: Path):
    recording = finishing(Recording(tmp_path, slots=64), 100)
    recording.step(num_finished_reqs=3)
    (view,) = watched(tmp_path, now_ns=recording.clock)
    assert (view.finished_all, view.steps) == (None, 101)
    sums = [line for line in detail(view, 80) if line.startswith("this run")]
    assert re.fullmatch(r"this run    since [\d:]+: 34 finished, 0 aborted, 31 preempted", sums[0])


def test_sums_begin_anew_behind_steps_that_were_missed(tmp_path: Path):
    watch = Watch(lambda: [tmp_path])
    recording = finishing(Recording(tmp_path, slots=64), 10)
    watch.refresh()
    (view,) = watch.views(10.0, recording.clock)
    assert (view.since, view.finished_run, view.finished_all, view.aborted_run) == (None, 10, 10, 1)
    finishing(recording, 1000)
    watch.refresh()
    finishing(recording, 5)
    watch.refresh()
    (view,) = watch.views(10.0, recording.clock)
    assert (view.finished_run, view.finished_all, view.hit_rate_run) == (32 + 5, 1015, 18 / 37)
    assert view.since is not None
    assert view.steps_rate == pytest.approx(37)
    watch.close()


def test_rates_are_of_the_time_that_the_ring_covers(tmp_path: Path):
    """A hundred steps a second, of which the ring holds the last 2.55 s."""
    recording = Recording(tmp_path, slots=256).run(1000)
    (view,) = watched(tmp_path, window=10.0, now_ns=recording.clock)
    assert view.steps_rate == pytest.approx(100)
    (view,) = watched(tmp_path, window=2.0, now_ns=recording.clock)
    assert view.steps_rate == pytest.approx(100)
    (view,) = watched(tmp_path, window=10.0, now_ns=recording.clock + 7_450_000_000)  # idle since
    assert view.steps_rate == pytest.approx(25.5)


def test_rates_of_the_first_seconds_are_of_these_seconds(tmp_path: Path):
    recording = Recording(tmp_path, slots=1024)
    recording.step(num_generation_tokens=1)
    (view,) = watched(tmp_path, now_ns=recording.clock)
    assert (view.steps_rate, view.decode_rate) == (1.0, 1.0), "one step of 10 ms does not make a hundred a second"
    recording.run(199)
    (view,) = watched(tmp_path, now_ns=recording.clock)
    assert view.steps_rate == pytest.approx(100)


def test_rates_of_a_long_window_are_of_the_steps_that_are_kept():
    live = Live(1, {})
    table = [("step", "<i8"), ("t_start_ns", "<i8"), ("t_end_ns", "<i8"), ("has_scheduler_stats", "<i8")]
    steps = np.zeros(20_000, [*table, ("kv_cache_usage", "<f8"), ("num_running_reqs", "<i8")])
    for n in range(5):  # 100,000 steps in 50 s, 65,536 are kept
        steps["step"] = np.arange(20_000) + n * 20_000
        steps["t_start_ns"] = steps["step"] * 500_000 + 1
        steps["t_end_ns"] = steps["t_start_ns"] + 500_000
        live.take(steps, {})
    for window in (1.0, 30.0, 60.0):
        assert live.view(int(steps["t_end_ns"][-1]), window).steps_rate == pytest.approx(2000)


@pytest.mark.parametrize("state", ["closed", "dead"])
def test_an_engine_that_has_ended_keeps_the_numbers_of_its_last_window(
    tmp_path: Path, state: str, monkeypatch: pytest.MonkeyPatch
):
    recording = busy(tmp_path)
    core = Core(recording)
    core.step(step=0, t_end_ns=NOW - 500_000_000, num_recomputed_tokens=100)
    watch = Watch(lambda: [tmp_path], clock=iter(range(0, 1000, 10)).__next__)
    watch.refresh()
    watch.refresh()
    (alive,) = watch.views(1.0, NOW)
    if state == "closed":
        recording.close()
    else:
        monkeypatch.setattr(RingReader, "writer_alive", False)
    watch.refresh()
    (ended,) = watch.views(1.0, NOW + 3600_000_000_000)
    assert ended.state == state
    kept = ("prefill_rate", "decode_rate", "steps_rate", "hit_rate", "preempted", "step_time", "ttft", "recomputed")
    assert {name: getattr(ended, name) for name in kept} == {name: getattr(alive, name) for name in kept}
    assert ended.steps_rate == 10.0
    watch.close()
