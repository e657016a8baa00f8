"""What ``kvhook top`` reads in the rings, as numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvhook.analysis.live import Live
from kvhook.core_schema import LIMITS
from kvhook.discovery import ancestry
from kvhook.discovery import watch as watch_module
from kvhook.discovery.rings import glance
from kvhook.discovery.watch import Wanted, Watch, descends_from, one_of
from kvhook.text.live import advice
from tests.conftest import ROOT
from tests.ring.synthetic import Recording
from tests.watched import NOW, Core, busy, watched

#: From here on no process has such a number: Linux gives none above 2 ** 22.
NOBODY = 1 << 23


def test_figures_of_the_window_and_of_the_run_are_those_of_the_steps(tmp_path: Path):
    busy(tmp_path)
    (view,) = watched(tmp_path, window=1.0, now_ns=NOW + 1)  # the last ten steps
    assert (view.pid, view.engine, view.steps, view.num_kv_blocks) == (os.getpid(), 0, 20, 100)
    assert (view.running, view.waiting, view.used) == (19, 1, 0.95)
    assert (view.prefill_rate, view.decode_rate, view.steps_rate) == (300.0, 100.0, 10.0)
    assert (view.hit_rate, view.hit_rate_run) == (300 / 400, 400 / 800)
    assert (view.preempted, view.preempted_run, view.finished_run, view.aborted_run) == (1, 1, 20, 1)
    assert view.step_time == pytest.approx((0.1, 0.1))
    assert view.cost == pytest.approx(5e-6)
    assert view.cost_share == pytest.approx(5e-5)
    assert view.history == [0.45, 0.95] or len(view.history) == 3  # the seconds of the clock
    assert view.lost == 0


def test_latencies_are_those_that_came_with_the_last_looks(tmp_path: Path):
    busy(tmp_path)
    (view,) = watched(tmp_path, window=5.0, now_ns=NOW + 1)
    values = np.arange(20) / 100
    assert view.ttft == pytest.approx((np.median(values), np.quantile(values, 0.99)))
    assert view.itl is None


def test_what_only_the_core_knows_comes_from_its_ring(tmp_path: Path):
    recording = busy(tmp_path)
    core = Core(recording)
    for n in range(10):
        core.step(
            step=n,
            t_end_ns=NOW - 500_000_000,
            limited_by=LIMITS.index("kv_blocks" if n < 6 else "none_waiting"),
            num_kv_blocks=100,
            num_kv_blocks_used=60,
            num_kv_blocks_cached=30,
            num_recomputed_tokens=7,
            num_kv_blocks_evicted=2,
        )
    (view,) = watched(tmp_path, window=1.0, now_ns=NOW + 1)
    assert [view.used, view.cached, view.empty] == pytest.approx([0.6, 0.3, 0.1])
    assert view.limits == [("kv_blocks", 0.6), ("none_waiting", 0.4)]
    assert (view.recomputed, view.evicted) == (70, 20)
    assert advice(view).startswith("too few KV blocks: requests were preempted, and 70 tokens")


@pytest.mark.parametrize(("caching", "cached"), [(True, 0.3 + 0.19), (False, 0.3)])
def test_what_the_last_request_left_behind_is_cached_rather_than_empty(tmp_path: Path, caching: bool, cached: float):
    """The core counts cached blocks when it has scheduled: what comes free at the end is not among them. The last
    block of each of the requests that finished in it (one) was not full."""
    core = Core(busy(tmp_path, enable_prefix_caching=caching))
    core.step(
        step=0,
        t_end_ns=NOW - 500_000_000,
        num_kv_blocks=100,
        num_kv_blocks_peak=20,
        num_kv_blocks_used=0,
        num_kv_blocks_cached=30,
    )
    (view,) = watched(tmp_path, window=1.0, now_ns=NOW + 1)
    assert [view.used, view.cached, view.empty] == pytest.approx([0.0, cached, 1 - cached])


def test_ranks_have_what_their_own_cores_know_whichever_began_first(tmp_path: Path):
    recordings = [busy(tmp_path, engine=rank, engine_index=rank) for rank in (0, 1)]
    cores = [Core(recordings[1 - place], data_parallel_rank=place) for place in (1, 0)]  # found in another order
    for rank, core in zip((1, 0), cores, strict=True):
        core.step(step=0, t_end_ns=NOW - 500_000_000, num_recomputed_tokens=100 + rank)
    views = watched(tmp_path, window=1.0, now_ns=NOW + 1)
    assert [(view.engine, view.recomputed) for view in views] == [(0, 100), (1, 101)]


def test_a_core_keeps_its_engine_when_another_one_ends(tmp_path: Path):
    recordings = [busy(tmp_path, engine=number) for number in (0, 1)]
    cores = [Core(recording) for recording in recordings]
    watch = Watch(lambda: [tmp_path], clock=iter(range(0, 1000, 10)).__next__)
    for number, core in enumerate(cores):
        core.step(step=0, t_end_ns=NOW - 500_000_000, num_recomputed_tokens=100 + number)
    watch.refresh()
    cores[0].ring.close()
    watch.refresh()
    cores[1].step(step=1, t_end_ns=NOW - 400_000_000, num_recomputed_tokens=1)
    watch.refresh()
    assert [view.recomputed for view in watch.views(1.0, NOW + 1)] == [100, 102]
    watch.close()


def test_what_a_core_did_before_its_engine_was_found_is_not_lost(tmp_path: Path):
    """The core's ring is made before the front end's, and a look may fall between the two."""
    elsewhere, place = tmp_path / "elsewhere", tmp_path / "place"
    elsewhere.mkdir()
    place.mkdir()
    recording = busy(elsewhere)
    core = Core(recording)
    core.ring.path.rename(place / core.ring.path.name)
    watch = Watch(lambda: [place], clock=iter(range(0, 1000, 10)).__next__)
    watch.refresh()
    core.step(step=0, t_end_ns=NOW - 500_000_000, num_recomputed_tokens=100)
    watch.refresh()
    recording.path.rename(place / recording.path.name)
    watch.refresh()
    watch.refresh()
    assert [view.recomputed for view in watch.views(1.0, NOW + 1)] == [100]
    watch.close()


def test_what_is_not_known_is_none(tmp_path: Path):
    recording = Recording(tmp_path)
    (view,) = watched(tmp_path)
    assert (view.idle, view.running, view.used, view.ttft, view.hit_rate) == (None,) * 5
    recording.record("step", step=0, t_start_ns=1, t_end_ns=2)  # a step that brought no stats
    (view,) = watched(tmp_path)
    assert (view.steps, view.running, view.used, view.hit_rate) == (1, None, None, None)


def test_engines_come_and_go_while_they_are_watched(tmp_path: Path):
    clock = [0.0]
    watch = Watch(lambda: [tmp_path], clock=lambda: clock[0])
    watch.refresh()
    assert watch.views(10.0) == []
    first = Recording(tmp_path).run(3)
    clock[0] += 1
    watch.refresh()
    assert [(v.steps, v.state) for v in watch.views(10.0)] == [(3, "alive")]
    second = Recording(tmp_path, engine=1).run(5)
    first.run(2).close()
    clock[0] += 1
    watch.refresh()
    assert [(v.engine, v.steps, v.state) for v in watch.views(10.0)] == [(1, 5, "alive"), (0, 5, "closed")]
    assert watch.works
    second.run(4)
    watch.refresh()  # no look for new rings, but for new records
    assert watch.views(10.0)[0].steps == 9
    (tmp_path / second.path.name).unlink()  # the ring's name is gone, the engine works on
    second.run(1)
    watch.refresh()
    assert watch.views(10.0)[0].steps == 10
    watch.close()


def test_records_that_were_overwritten_are_counted(tmp_path: Path):
    watch = Watch(lambda: [tmp_path])
    recording = Recording(tmp_path, slots=64).run(1)
    watch.refresh()
    recording.run(1000)
    watch.refresh()
    (view,) = watch.views(10.0)
    assert view.steps == 1001
    assert view.lost == 1000 - 63
    watch.close()


def test_processes_can_be_chosen():
    assert one_of([])(5, 1)
    five, six, seven, eight, nine = range(NOBODY + 5, NOBODY + 10)
    processes = ((five, 1), (six, five), (seven, six))
    assert [one_of([five])(*process) for process in processes] == [True, True, False]
    below = descends_from(five)
    assert [below(*process) for process in ((six, five), (seven, six), (eight, nine))] == [True, True, False]


def test_a_core_whose_ring_was_there_first_is_watched_once_it_is_known_whose_it_is(tmp_path: Path):
    """It says which process its front end is, and only the front end's own ring says where that comes from."""
    elsewhere, place = tmp_path / "elsewhere", tmp_path / "place"
    elsewhere.mkdir()
    place.mkdir()
    recording = busy(elsewhere, parent_pid=NOBODY)
    core = Core(recording)
    core.step(step=0, t_end_ns=NOW - 500_000_000, num_recomputed_tokens=100)
    core.ring.path.rename(place / core.ring.path.name)
    watch = Watch(lambda: [place], descends_from(NOBODY), clock=iter(range(0, 1000, 10)).__next__)
    watch.refresh()
    assert watch.views(1.0, NOW + 1) == []
    recording.path.rename(place / recording.path.name)
    watch.refresh()
    assert [view.recomputed for view in watch.views(1.0, NOW + 1)] == [100]
    watch.close()


def test_the_header_of_a_ring_that_is_not_wanted_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    glances: list[Path] = []

    def counted(path: Path) -> Any:
        glances.append(path)
        return glance(path)

    monkeypatch.setattr(watch_module, "glance", counted)
    Core(Recording(tmp_path, parent_pid=NOBODY))
    watch = Watch(lambda: [tmp_path], one_of([NOBODY + 1]), clock=iter(range(0, 1000, 10)).__next__)
    for _ in range(5):
        watch.refresh()
    assert len(glances) == 2  # of the front end, and of its core
    assert watch.views(1.0) == []
    watch.close()


@pytest.mark.parametrize("wanted", [descends_from, lambda pid: one_of([pid])])
def test_a_process_between_them_that_does_not_record_does_not_hide_an_engine(
    tmp_path: Path, wanted: Callable[[int], Wanted]
):
    """A shell started it. What was found stays found when the shell has gone, also for what the engine starts then."""
    code = (
        "import sys; from pathlib import Path; from tests.ring.synthetic import Recording;"
        "made = Recording(Path(sys.argv[1])).run(3); print('ready', flush=True); sys.stdin.readline()"
    )
    shell = subprocess.Popen(
        ["sh", "-c", '"$@"; true', "sh", sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert shell.stdin is not None
    assert shell.stdout is not None
    try:
        assert shell.stdout.readline() == "ready\n"
        family, strangers = wanted(os.getpid()), wanted(NOBODY)
        assert [len(watched(tmp_path, wanted=one)) for one in (family, strangers)] == [1, 0]
        (ring,) = tmp_path.glob("*.ring")
        engine = int(ring.name.split("-")[0])
        shell.kill()
        shell.wait()
        assert family(NOBODY + 1, engine)
    finally:
        shell.kill()
        shell.communicate("\n", timeout=60)


def test_the_number_of_a_process_that_has_ended_may_be_another_one_s(monkeypatch: pytest.MonkeyPatch):
    starts = {NOBODY: 1, NOBODY + 1: 2}
    monkeypatch.setattr(ancestry, "process_start", lambda pid: starts.get(pid, 0))
    family = ancestry.Family([NOBODY])
    assert family.has(NOBODY + 1, NOBODY)
    del starts[NOBODY]
    assert family.has(NOBODY + 1, 1)
    assert family.has(NOBODY + 2, NOBODY + 1)
    starts[NOBODY + 1] = 3
    assert not family.has(NOBODY + 1, 1)
    assert not family.has(NOBODY + 3, NOBODY + 1)


def test_a_number_in_another_container_is_another_process():
    assert not descends_from(5)(6, 5, True)
    assert [one_of([5])(*process, True) for process in ((5, 1), (6, 5), (7, 6))] == [True, True, False]


def test_memory_is_bounded(tmp_path: Path):
    live = Live(1, {})
    dtype = [("step", "<i8"), ("t_start_ns", "<i8"), ("t_end_ns", "<i8"), ("has_scheduler_stats", "<i8")]
    steps = np.zeros(20_000, [*dtype, ("kv_cache_usage", "<f8"), ("num_running_reqs", "<i8")])
    for n in range(8):
        steps["t_end_ns"] = np.arange(20_000) * 1_000_000 + n * 30_000_000_000 + 1
        live.take(steps, {})
    assert len(live._steps) <= 1 << 16
    assert live._steps._rows is not None
    assert len(live._steps._rows) <= 4 * (1 << 16)
    assert len(live._history) <= 240
