"""The probe that times what vLLM's stats take, alone and under a budget, with clocks that are wound by hand."""

from __future__ import annotations

import gc
import itertools
import weakref
from typing import Any

import pytest

from kvhook.recording import budget as cost
from kvhook.recording.budget import PROBE_EVERY, WINDOW, WINDOWS, Level, OverheadMonitor, StatsProbe
from tests.budgets import STEP_NS, Down


class Clock:
    """Nanoseconds that pass only when somebody lets them."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(cost, "clock", made)
    return made


class Processor:
    """As vLLM's output processor: in a step its stats take 10 ns an output, 300 a finished request; all else 5000."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.calls: list[str] = []
        self.fails = ""

    def process_outputs(self, outputs: list[str], timestamp: float = 0.0) -> list[str]:
        self.clock.now += 5000
        for output in outputs:
            self.update_from_output(output)
        if outputs:
            self.update_from_finished(outputs[-1], reason="length")
        return outputs

    def update_from_output(self, output: str) -> None:
        self.spend("update_from_output", 10)

    def update_from_finished(self, output: str, *, reason: str) -> str:
        self.spend("update_from_finished", 300)
        return reason

    def spend(self, name: str, ns: int) -> None:
        self.clock.now += ns
        self.calls.append(name)
        if self.fails == name:
            raise RuntimeError(name)


METHODS = ("update_from_output", "update_from_finished")
#: what making an IterationStats takes
MAKING = 7


def probe_of(processor: Processor, **more: Any) -> StatsProbe:
    def make() -> None:
        processor.clock.now += MAKING

    return StatsProbe(processor, METHODS, make, **more)


def test_it_measures_the_step_after_it_was_armed_and_no_other(clock: Clock):
    processor = Processor(clock)
    probe = probe_of(processor)
    assert processor.process_outputs(["a", "b"]) == ["a", "b"]
    assert probe.take() == -1
    probe.arm()
    assert probe.take() == -1
    assert processor.process_outputs(["a", "b", "c"], timestamp=1.0) == ["a", "b", "c"]
    assert vars(processor).keys() == {"clock", "calls", "fails"}
    processor.process_outputs(["a"] * 50)
    assert probe.take() == MAKING + 3 * 10 + 300
    assert probe.take() == -1


def test_a_step_without_outputs_costs_what_making_the_stats_takes(clock: Clock):
    processor = Processor(clock)
    probe = probe_of(processor)
    probe.arm()
    processor.process_outputs([])
    assert probe.take() == MAKING


def test_while_it_is_not_armed_nothing_of_it_is_in_the_processor(clock: Clock):
    processor = Processor(clock)
    before = dict(vars(processor))
    probe = probe_of(processor)
    assert vars(processor) == before
    for _ in range(3):
        probe.arm()
        assert vars(processor).keys() - before.keys() == {"process_outputs"}
        processor.process_outputs(["a"])
        assert vars(processor).keys() == before.keys()


def test_what_a_tap_has_put_there_is_called_and_put_back(clock: Clock):
    processor = Processor(clock)
    inner, seen = processor.process_outputs, []

    def tap(outputs: list[str], **more: Any) -> list[str]:
        seen.append(len(outputs))
        return inner(outputs, **more)

    vars(processor)["process_outputs"] = tap
    probe = probe_of(processor)
    for outputs in (["a"], ["b", "c"]):
        probe.arm()
        assert processor.process_outputs(outputs, timestamp=2.0) == outputs
        assert vars(processor)["process_outputs"] is tap
        assert probe.take() == MAKING + 10 * len(outputs) + 300
    assert seen == [1, 2]


def test_somebody_elses_replacement_of_a_method_is_called_and_put_back(clock: Clock):
    processor = Processor(clock)
    inner, seen = processor.update_from_output, []

    def theirs(output: str) -> None:
        seen.append(output)
        inner(output)

    vars(processor)["update_from_output"] = theirs
    probe = probe_of(processor)
    probe.arm()
    processor.process_outputs(["a", "b"])
    assert seen == ["a", "b"]
    assert vars(processor)["update_from_output"] is theirs
    assert "update_from_finished" not in vars(processor)
    assert probe.take() == MAKING + 2 * 10 + 300


def test_who_wraps_the_processor_while_it_is_armed_stays_and_one_step_alone_is_measured(clock: Clock):
    processor = Processor(clock)
    probe = probe_of(processor)
    probe.arm()
    armed = processor.process_outputs

    def theirs(outputs: list[str]) -> list[str]:
        return armed(outputs)

    vars(processor)["process_outputs"] = theirs
    for _ in range(3):
        processor.process_outputs(["a"])
        assert vars(processor)["process_outputs"] is theirs
        assert not vars(processor).keys() & set(METHODS)
    assert probe.take() == MAKING + 10 + 300
    processor.process_outputs(["a"])
    assert probe.take() == -1


@pytest.mark.parametrize("method", METHODS)
def test_an_exception_in_vllms_method_passes_through_and_everything_is_put_back(clock: Clock, method: str):
    processor = Processor(clock)
    probe = probe_of(processor)
    processor.fails = method
    probe.arm()
    with pytest.raises(RuntimeError, match=method):
        processor.process_outputs(["a"])
    assert vars(processor).keys() == {"clock", "calls", "fails"}
    processor.fails = ""
    probe.arm()
    processor.process_outputs(["a", "b"])
    assert probe.take() == MAKING + 2 * 10 + 300


def test_an_error_of_its_own_never_reaches_the_engine_and_is_told_once(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    processor = Processor(clock)
    told: list[Exception] = []
    probe = probe_of(processor, failed=told.append)

    def fail(*_: Any) -> None:
        raise ValueError("planted")

    monkeypatch.setattr(StatsProbe, "_timed", fail)
    for _ in range(5):
        probe.arm()
        assert processor.process_outputs(["a"]) == ["a"]
        assert vars(processor).keys() == {"clock", "calls", "fails"}
        assert probe.take() == -1
    assert [str(error) for error in told] == ["planted"]
    assert processor.calls == list(METHODS) * 5


def test_disarmed_it_leaves_the_processor_as_it_was(clock: Clock):
    processor = Processor(clock)
    probe = probe_of(processor)
    probe.disarm()
    probe.arm()
    probe.disarm()
    assert "process_outputs" not in vars(processor)

    def tap(outputs: list[str]) -> list[str]:
        return outputs

    vars(processor)["process_outputs"] = tap
    probe.arm()
    assert processor.process_outputs is not tap
    probe.disarm()
    assert vars(processor)["process_outputs"] is tap
    processor.process_outputs(["a"])
    assert probe.take() == -1


def test_armed_again_before_a_step_came_it_measures_once(clock: Clock):
    processor = Processor(clock)
    probe = probe_of(processor)
    for _ in range(3):
        probe.arm()
    processor.process_outputs(["a"])
    assert vars(processor).keys() == {"clock", "calls", "fails"}
    assert probe.take() == MAKING + 10 + 300


@pytest.mark.parametrize("armed", [False, True])
def test_it_does_not_keep_the_processor_alive(clock: Clock, armed: bool):
    processor = Processor(clock)
    probe = probe_of(processor)
    if armed:
        probe.arm()
    gone = weakref.ref(processor)
    del processor
    gc.collect()
    assert gone() is None
    probe.arm()
    probe.disarm()
    assert probe.take() == -1


def test_a_processor_without_these_methods_is_refused(clock: Clock):
    with pytest.raises(AttributeError, match="update_from_nothing"):
        StatsProbe(Processor(clock), ("update_from_nothing",), object)


# Under a budget


def test_one_sample_in_so_many_is_measured_and_handed_on_once(clock: Clock):
    processor = Processor(clock)
    one = OverheadMonitor(0)
    one.probe = probe_of(processor)
    got = []
    for _ in range(3 * PROBE_EVERY):
        got.append(one.sample(0, 0, 0, 0, STEP_NS, 1))
        processor.process_outputs(["a"])
    measured = MAKING + 10 + 300
    once = [-1, measured, -1, -1]
    assert got == list(itertools.islice(itertools.cycle(once), 3 * PROBE_EVERY))


def test_what_vllm_takes_counts_against_the_budget_until_it_makes_no_stats_any_more(clock: Clock):
    processor, down = Processor(clock), Down()
    stats_ns = MAKING + 10 + 300
    # kvhook's own part alone is within the budget, both together are not
    one = OverheadMonitor(0, max_overhead=1.5 * stats_ns / STEP_NS, step_down=down)
    one.probe = probe_of(processor)

    def go(samples: int) -> None:
        for _ in range(samples):
            one.sample(0, 0, 0, 0, STEP_NS, stats_ns)
            processor.process_outputs(["a"])

    go(WINDOW * WINDOWS)
    assert down.asked == [Level("light")]
    assert vars(one)["probe"] is None
    assert "process_outputs" not in vars(processor)
    go(10 * WINDOW * WINDOWS)
    assert down.asked == [Level("light")]


def test_where_it_cannot_step_down_it_goes_on_measuring(clock: Clock):
    processor = Processor(clock)
    one = OverheadMonitor(0, max_overhead=1e-9, step_down=Down(lambda _: False))
    one.probe = probe_of(processor)
    for _ in range(WINDOW * WINDOWS + PROBE_EVERY):
        last = one.sample(0, 0, 0, 0, STEP_NS, 1)
        processor.process_outputs(["a"])
        if last >= 0:
            measured = last
    assert one.probe is not None
    assert measured == MAKING + 10 + 300


def test_stopped_it_leaves_nothing_in_the_processor(clock: Clock):
    processor = Processor(clock)
    one = OverheadMonitor(0)
    one.stop()
    one.probe = probe_of(processor)
    one.sample(0, 0, 0, 0, STEP_NS, 1)
    assert "process_outputs" in vars(processor)
    one.stop()
    assert "process_outputs" not in vars(processor)
