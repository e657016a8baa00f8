"""``kvhook tail``: lines as they happen, by a clock that the test moves."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvhook.cli import main
from kvhook.cli.tail import lines
from kvhook.discovery.follow import CLOSED, DIED, News, follow
from kvhook.discovery.rings import wait_for
from kvhook.ring.reader import RingReader
from kvhook.text.steps import COLUMNS, StepLines, clock_time
from tests.conftest import ROOT
from tests.ring.synthetic import LAYOUT, Recording


class Clock:
    """Time that passes only when somebody sleeps; each sleep does the next thing on the list."""

    def __init__(self, *then: Callable[[], object]) -> None:
        self.now, self.then = 100.0, list(then)
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        if not self.then:
            raise TimeoutError("nothing more happens")
        self.then.pop(0)()


def told(recording: Recording, clock: Clock, **options: object) -> tuple[list[str], list[str]]:
    """What tail prints, and what it says beside."""
    said: list[str] = []
    with RingReader(recording.path) as reader:
        news = follow(reader, interval=0.5, sleep=clock.sleep, clock=clock)
        printed = list(lines(news, reader.header, say=said.append, ascii_only=True, **options))  # type: ignore[arg-type]
    return printed, said


def test_a_line_per_step_as_it_happens_until_the_ring_is_closed(tmp_path: Path):
    recording = Recording(tmp_path).run(2)
    clock = Clock(recording.step, lambda: recording.run(3), lambda: None, lambda: recording.run(1).close())
    printed, said = told(recording, clock)
    assert [line.split()[0] for line in printed] == ["step", "0", "1", "2", "3", "4", "5", "6"]
    assert said == ["closed after step 6: the engine was deleted, or the program came to its end"]
    assert clock.slept == [0.5] * 4


def test_a_writer_that_dies_is_seen_and_its_last_record_read(tmp_path: Path):
    recording = Recording(tmp_path).run(2)

    def die_before_the_head_moves() -> None:
        recording.run(2)
        recording.ring.words[16] = 3
        recording.patch(pid=1 << 30)

    clock = Clock(die_before_the_head_moves)
    said: list[str] = []
    with RingReader(recording.path) as reader:
        alive = iter([True, False])
        news = follow(_Mortal(reader, alive), interval=1.0, sleep=clock.sleep, clock=clock)  # type: ignore[arg-type]
        printed = list(lines(news, reader.header, say=said.append))
    assert [line.split()[0] for line in printed[1:]] == ["0", "1", "2", "3"]
    assert len(said) == 1
    assert said[0].startswith("the process has died after step 3")
    assert "kvhook autopsy" in said[0]


class _Mortal:
    """A reader whose writer dies when the test says so."""

    def __init__(self, reader: RingReader, alive) -> None:
        self._reader, self._alive = reader, alive

    @property
    def writer_alive(self) -> bool:
        return next(self._alive)

    @property
    def closed(self) -> bool:
        return self._reader.closed

    def poll(self, *args, **kwargs):
        return self._reader.poll(*args, **kwargs)


def test_whether_the_writer_lives_is_not_asked_all_the_time(tmp_path: Path):
    recording = Recording(tmp_path).run(1)
    asked = []

    class Counting(_Mortal):
        @property
        def writer_alive(self) -> bool:
            asked.append(clock.now)
            return True

    clock = Clock(*[lambda: None] * 100, lambda: recording.close())
    with RingReader(recording.path) as reader:
        news = list(follow(Counting(reader, None), interval=0.01, sleep=clock.sleep, clock=clock))  # type: ignore[arg-type]
    assert news[-1].end == CLOSED
    assert len(asked) <= 4, "101 looks at the ring within a second, 2 at the process"


def test_it_begins_some_steps_back_and_the_hit_rate_counts_them_all(tmp_path: Path):
    recording = Recording(tmp_path)
    for _ in range(30):
        recording.step(prefix_cache_queries=10, prefix_cache_hits=2)
    clock = Clock(lambda: recording.step(prefix_cache_queries=100, prefix_cache_hits=100), recording.close)
    printed, _ = told(recording, clock, back=3)
    assert [line.split()[0] for line in printed[1:]] == ["27", "28", "29", "30"]
    # (30 * 2 + 100) / (30 * 10 + 100)
    assert ["20.0 %" in line for line in printed[1:]] == [True, True, True, False]
    assert "40.0 %" in printed[-1]


def test_all_that_comes_after_the_beginning_is_shown(tmp_path: Path):
    # also what came between opening the ring and the first look at its records
    recording = Recording(tmp_path).run(5)
    said: list[str] = []
    with RingReader(recording.path) as reader:
        recording.run(20).close()
        printed = list(lines(follow(reader), reader.header, 2, say=said.append))
    assert [line.split()[0] for line in printed[1:]] == list(map(str, range(3, 25)))


def test_what_was_overwritten_is_counted_and_said(tmp_path: Path):
    recording = Recording(tmp_path, slots=16).run(1)
    clock = Clock(lambda: recording.run(50), recording.close)
    printed, said = told(recording, clock)
    assert [line.split()[0] for line in printed[1:]] == ["0", *map(str, range(36, 51))]
    assert said[0] == "35 records were overwritten before they could be read"


def test_columns_are_aligned_and_what_is_not_known_is_a_dash(tmp_path: Path):
    text = StepLines(0, 0, ascii_only=True)
    heading = text.heading()
    known = text.line(
        {
            "step": 7,
            "t_start_ns": 0,
            "t_end_ns": 4_200_000,
            "num_running_reqs": 8,
            "num_waiting_reqs": 12,
            "kv_cache_usage": 0.42,
            "prefix_cache_queries": 4,
            "prefix_cache_hits": 1,
            "num_prompt_tokens": 99,
            "num_generation_tokens": 8,
            "num_preempted_reqs": 3,
        }
    )
    blank = text.line({"step": 8, "t_start_ns": 0, "t_end_ns": 10, "num_preempted_reqs": 0})
    assert "####......   42.0 %" in known
    assert "25.0 %" in known
    assert len(heading) == len(known) == sum(w for _, w in COLUMNS) + 2 * (len(COLUMNS) - 1)
    ends = [heading.index(name) + len(name) for name, _ in COLUMNS]
    assert "".join(known[e - 1] for e in ends) == f"7{known[ends[1] - 1]}s82%%983"
    assert blank.split()[2:] == ["0.01", "us", "-", "-", "-", "25.0", "%", "-", "-"]
    assert "0.0 %" not in blank, "a usage that is not known is not 0"


@pytest.mark.parametrize("share", [-1.0, 0.0, 0.5, 1.0, 7.0, float("inf"), 1e300])
def test_a_bar_is_as_long_as_it_may_be(share: float):
    line = StepLines(0, 0, ascii_only=True).line({"step": 0, "kv_cache_usage": share})
    bar = line.split()[-6 if "%" in line else -1]
    assert set(bar) <= set("#.") or len(line) < 200


def test_impossible_times_are_a_dash():
    assert clock_time(1 << 62) == "-" or ":" in clock_time(1 << 62)
    assert clock_time(10**30) == "-"
    assert clock_time(-(10**30)) == "-"


def test_json_lines(tmp_path: Path):
    recording = Recording(tmp_path).run(1)
    recording.finish(3)
    recording.step(0.5)
    recording.record("step", step=2, t_end_ns=5)
    recording.close()
    printed, _ = told(recording, Clock(), as_json=True)
    rows = [json.loads(line) for line in printed]
    assert [r["kind"] for r in rows] == ["step"] * 3
    assert [r["kv_cache_usage"] for r in rows] == [0.25, 0.5, None]
    columns = {c.name for c in LAYOUT.columns["step"]} | {"t_start_unix_ns", "t_end_unix_ns"}
    assert columns - {"mm_cache_hits"} == rows[0].keys() - {"kind", "engine"}


def test_a_ring_without_steps_yet(tmp_path: Path):
    recording = Recording(tmp_path)
    printed, said = told(recording, Clock(recording.close))
    assert len(printed) == 1
    assert said == ["closed after no step: the engine was deleted, or the program came to its end"]


def test_memory_is_bounded_whatever_the_ring_holds(tmp_path: Path):
    recording = Recording(tmp_path, slots=16384).run(10_000).close()
    with RingReader(recording.path) as reader:
        news = list(follow(reader))
    assert max(len(n.slots) for n in news) <= 4096
    assert sum(len(n.slots) for n in news) == 10_000


def test_news_says_how_it_ends():
    assert News.__annotations__.keys() == {"slots", "lost", "end"}
    assert CLOSED != DIED


# ---- the command ---------------------------------------------------------------------------------------------------


def test_the_newest_running_one_is_followed_by_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    Recording(tmp_path, engine=0).run(2).die()
    Recording(tmp_path, engine=1).run(3).close()
    assert main(["tail", "--dir", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ["step", "0", "1", "2"]
    assert "engine 1" in err
    assert "closed after step 2" in err
    assert main(["tail", str(os.getpid()), "--engine", "0", "-n", "1", "--dir", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ["step", "1"]
    assert "has died after step 1" in err


def test_json_goes_to_stdout_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = Recording(tmp_path).run(2).close().path
    assert main(["tail", str(path), "--json"]) == 0
    out, err = capsys.readouterr()
    assert [json.loads(line)["step"] for line in out.splitlines()] == [0, 1]
    assert "closed after" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["tail"], "there is no ring"),
        (["tail", "1"], "there is no ring of process 1"),
        (["tail", "nonsense"], "'nonsense' is neither the number of a process nor a file"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str):
    assert main([*argv, "--dir", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("argv", [["tail", "--interval", "0"], ["tail", "--interval", "60"], ["tail", "-n", "-1"]])
def test_intervals_and_counts_are_bounded(capsys: pytest.CaptureFixture[str], argv: list[str]):
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == 2


def test_waiting_ends_with_the_first_ring_that_is_written(tmp_path: Path):
    Recording(tmp_path, engine=0).run(2).die()
    (tmp_path / f"{os.getpid()}-{1}-7.ring").write_bytes(b"\0" * 5000)  # one that is just being made: no magic yet
    clock = Clock(lambda: None, lambda: Recording(tmp_path, engine=5).run(1))
    ring = wait_for(lambda: [tmp_path], sleep=clock.sleep, interval=0.3)
    assert ring.engine == 5
    assert clock.slept == [0.3, 0.3]


@contextlib.contextmanager
def sigint(what: Any) -> Iterator[None]:
    """What a program that is started now does at Ctrl-C: it inherits what pytest does, whose own parent may ignore it.
    A Python function stands for the default then."""
    before = signal.signal(signal.SIGINT, what)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def run_tail(tmp_path: Path, *argv: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "kvhook", "tail", "--dir", str(tmp_path), "--interval", "0.02", *argv],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_wait_follows_a_run_that_starts_later_and_is_killed(tmp_path: Path):
    # however late it sees the ring, it begins with the first step
    tail = run_tail(tmp_path, "--wait", "-n", "1000000")
    assert tail.stdout is not None
    assert tail.stderr is not None
    assert "waiting for a run" in tail.stderr.readline()
    code = """
import sys, time
from pathlib import Path
from tests.ring.synthetic import Recording
recording = Recording(Path(sys.argv[1]))
while True:
    recording.step()
    time.sleep(0.02)
"""
    writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        assert tail.stdout.readline().split()[0] == "step"
        first = [int(tail.stdout.readline().split()[0]) for _ in range(3)]
    finally:
        writer.kill()
        writer.wait()
    out, err = tail.stdout.read(), tail.stderr.read()
    tail.wait(30)
    steps = first + [int(line.split()[0]) for line in out.splitlines()]
    assert steps == list(range(len(steps)))
    assert tail.returncode == 0
    assert f"the process has died after step {steps[-1]}" in err


def test_ctrl_c_ends_it_without_a_traceback(tmp_path: Path):
    recording = Recording(tmp_path).run(3)
    before = recording.path.read_bytes()
    with sigint(signal.default_int_handler):
        tail = run_tail(tmp_path)
    assert tail.stdout is not None
    for _ in range(4):
        tail.stdout.readline()
    tail.send_signal(signal.SIGINT)
    _, err = tail.communicate(timeout=30)
    assert tail.returncode == 130
    assert "Traceback" not in err
    assert recording.path.read_bytes() == before, "it only reads"


def test_in_the_background_of_a_script_ctrl_c_is_not_meant_for_it(tmp_path: Path):
    """A shell without job control starts ``kvhook tail &`` with SIGINT ignored; it stays so."""
    recording = Recording(tmp_path).run(3)
    with sigint(signal.SIG_IGN):
        tail = run_tail(tmp_path)
    assert tail.stdout is not None
    for _ in range(4):
        tail.stdout.readline()
    tail.send_signal(signal.SIGINT)
    recording.run(2).close()
    out, err = tail.communicate(timeout=30)
    assert [line.split()[0] for line in out.splitlines()] == ["3", "4"]
    assert "closed after step 4" in err
    assert tail.returncode == 0
