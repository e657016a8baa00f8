"""What recording costs, measured during the run, and the limit on it.

In every eighth step the publisher reports how long kvhook took (`kvhook.adapters.publisher.MEASURE_EVERY`). In every
32nd step it is measured how long vLLM took to make iteration stats that only kvhook had asked for. In the other steps
nothing is measured, so that measuring costs next to nothing.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from kvhook.adapters.step_functions import Counters
from kvhook.adapters.table import Adapter, lookup
from kvhook.faults import USERS, pass_on
from kvhook.overlays import Overlay

clock = time.monotonic_ns

#: Samples between two measurements of vLLM's part, which read the clock twice for each output of the step.
PROBE_EVERY = 4
#: Samples in a window, and windows in a row that must be over the budget before anything is changed: 32 x 8 steps,
#: three times. The start of a run, or a busy moment, is shorter than that.
WINDOW, WINDOWS = 32, 3


class Level(NamedTuple):
    """How much is recorded: a name in `kvhook.schema.LEVELS`; outputs are counted in one of ``every`` steps."""

    name: str
    every: int = 1


#: The levels in the order in which they are taken when the budget is exceeded for long.
LADDER = (Level("full"), Level("light"), Level("sparse", 4), Level("sparse", 16), Level("sparse", 64))


class OverheadMonitor:
    """Adds up what recording one engine costs, and steps down when that is over the budget for long.

    Args:
        call_ns: what each step costs outside the publisher (`kvhook.recording.overhead`).
        level: the level at which it starts.
        max_overhead: the budget, as a share of the time inside steps; None for no budget.
        step_down: ``step_down(level, counters, share)`` changes to a level; returns False if that cannot be done.
    """

    def __init__(
        self,
        call_ns: int,
        level: str = "full",
        max_overhead: float | None = None,
        step_down: Callable[[Level, Counters, float], bool] = lambda *_: False,
    ) -> None:
        self.probe: StatsProbe | None = None
        self._call_ns = call_ns
        self._rest = LADDER[[rung.name for rung in LADDER].index(level) + 1 :]
        self._max_overhead = max_overhead
        self._step_down = step_down
        self._samples = self._cost = self._time = self._stats_ns = self._over = 0

    def sample(self, n: int, step: int, request_number: int, t_start_ns: int, t_end_ns: int, kvhook_ns: int) -> int:
        """Take what the publisher measured; returns what vLLM's part took if that was measured since, else -1."""
        stats_ns = -1
        self._samples += 1
        if self.probe is not None:
            stats_ns = self.probe.take()
            if stats_ns >= 0:
                self._stats_ns = stats_ns
            if self._samples % PROBE_EVERY == 1:
                self.probe.arm()
        if self._max_overhead is not None and t_end_ns > t_start_ns:  # else there is no step time to have a share of
            self._cost += kvhook_ns + self._call_ns + self._stats_ns
            self._time += t_end_ns - t_start_ns
            if not self._samples % WINDOW:
                self._end_window(Counters(n, step, request_number))
        return stats_ns

    def at_light(self) -> None:
        """The engine is recorded at level light from now on, for another reason than its cost."""
        self.stop()
        self.probe, self._stats_ns = None, 0
        self._rest = LADDER[2:]

    def stop(self) -> None:
        """Take out of the engine what waits for its next step."""
        if self.probe is not None:
            self.probe.disarm()

    def _end_window(self, counters: Counters) -> None:
        """Step down if this window was over the budget, and those before it too."""
        share = self._cost / max(self._time, 1)
        self._cost = self._time = 0
        self._over = self._over + 1 if self._max_overhead is not None and share > self._max_overhead else 0
        if self._over < WINDOWS or not self._rest:
            return
        self._over, level, self._rest = 0, self._rest[0], self._rest[1:]
        self.stop()
        if not self._step_down(level, counters, share):
            self._rest = ()
        else:
            self.probe, self._stats_ns = None, 0


class StatsProbe:
    """Measures in single steps how long vLLM's front end takes to make iteration stats. In other steps it is not there.

    Args:
        processor: the engine's output processor.
        methods: those of its methods in which vLLM fills its stats in, called for each output and each finished
            request. The time of an empty timed call is subtracted for each.
        make_stats: vLLM's IterationStats, made once a step.
        failed: is called with an error of the probe's own, after which nothing is measured any more.

    Raises:
        AttributeError: this vLLM has no such methods.
    """

    def __init__(
        self,
        processor: Any,
        methods: tuple[str, ...],
        make_stats: Callable[[], Any],
        failed: Callable[[BaseException], None] = lambda _: None,
    ) -> None:
        self._processor = weakref.ref(processor)  # the recording outlives the engine, and must not hold on to it
        self._methods = methods
        self._failed = failed
        for name in methods:
            getattr(processor, name)
        start = clock()
        for _ in range(16):
            make_stats()
        self._making = (clock() - start) // 16
        self._armed = self._broken = False
        self._spent = self._calls = 0
        self._measured = -1
        empty = self._timed(lambda *_: None)
        for _ in range(64):
            empty(None, None, None, None)
        self._call, self._spent, self._calls = self._spent // 64, 0, 0

    def arm(self) -> None:
        """Measure in the next step."""
        processor = self._processor()
        if processor is None or self._armed or self._broken:
            return
        process_outputs = processor.process_outputs

        def process_outputs_measured(*args: Any, **kwargs: Any) -> Any:
            if not self._armed:  # somebody has kept this function beyond its step
                return process_outputs(*args, **kwargs)
            self.disarm()
            put_back = self._begin(processor)
            try:
                return process_outputs(*args, **kwargs)
            finally:
                put_back()

        # the function alone holds what puts back the one before it: this object must not hold on to the engine
        overlay, self._armed = Overlay(processor, "process_outputs", process_outputs_measured), True
        vars(process_outputs_measured).update(probe=self, overlay=overlay)

    def disarm(self) -> None:
        """Take out what waits for the next step."""
        self._armed, processor = False, self._processor()
        mine: Any = vars(processor).get("process_outputs") if processor is not None else None
        if getattr(mine, "probe", None) is self:
            mine.overlay.take_out()

    def _begin(self, processor: Any) -> Callable[[], None]:
        """Time the methods from now on; returns a function that ends that. Raises nothing: it runs inside a step."""
        own = {name: vars(processor)[name] for name in self._methods if name in vars(processor)}

        def put_back() -> None:
            for name in self._methods:
                vars(processor).pop(name, None)
            vars(processor).update(own)
            if not self._broken:
                self._measured = max(0, self._spent - self._calls * self._call)

        self._spent, self._calls = self._making, 0
        try:
            for name in self._methods:
                setattr(processor, name, self._timed(getattr(processor, name)))
        except USERS:
            raise
        except BaseException as error:
            pass_on(error)
            self._broken = True
            self._failed(error)
        return put_back

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = clock()
            try:
                return method(*args, **kwargs)
            finally:
                self._spent += clock() - start
                self._calls += 1

        return timed

    def take(self) -> int:
        """Nanoseconds of the step that was measured last; -1 if there is none, or it was taken already."""
        measured, self._measured = self._measured, -1
        return measured


def probe_of(engine: Any, adapter: Adapter, failed: Callable[[BaseException], None]) -> StatsProbe | None:
    """The probe of an engine, where this vLLM makes its stats in a place that can be timed."""
    path = next((s.path for s in adapter.sources if s.argument == "iteration_stats"), "")
    processor = getattr(engine, "output_processor", None)
    if not path or processor is None or not all(hasattr(processor, name) for name in adapter.makes_stats_in):
        return None
    return StatsProbe(processor, adapter.makes_stats_in, lookup(path), failed) if adapter.makes_stats_in else None
