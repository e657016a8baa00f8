"""What the hooks call: an engine was made, a request was added, an engine's stats came to nobody."""

from __future__ import annotations

import abc
import functools
import logging
import multiprocessing
import multiprocessing.util
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvhook import hooks
from kvhook.adapters.columns import STATS_FOR_KVHOOK
from kvhook.adapters.config import engine_facts
from kvhook.adapters.publisher import no_sample
from kvhook.facts import ANONYMOUS, class_of_vllm, kind_of_error
from kvhook.faults import USERS, Faults
from kvhook.recording.budget import OverheadMonitor, probe_of
from kvhook.recording.overhead import call_overhead_ns
from kvhook.recording.plan import plan_engine
from kvhook.recording.readings import Readings
from kvhook.recording.recorder import Recorder
from kvhook.records.engine_events import CODES, DONE, ENDS_REST, IN_PIECES, RESTS

if TYPE_CHECKING:
    from kvhook.adapters.calls import Call
    from kvhook.adapters.engine_events import Told
    from kvhook.adapters.step_functions import Counters, StepFunctions
    from kvhook.adapters.table import Adapter
    from kvhook.options import Options
    from kvhook.recording.budget import Level
    from kvhook.recording.notebook import Notebook
    from kvhook.recording.own_steps import OwnSteps
    from kvhook.recording.spool import Spool

log = logging.getLogger("kvhook")

#: Held while a session, or which session is installed, changes. One lock for both, so that there is no order to keep.
lock = threading.RLock()


class Owner(Readings):
    """The part of `kvhook.Session` that makes a recorder for each engine; see `kvhook.hooks.Owner`."""

    options: Options
    #: id(engine) -> its recorders: one for each engine core (data-parallel rank)
    _recorders_of: dict[int, list[Recorder]]
    _monitors: list[OverheadMonitor]
    _faults: Faults
    _notebook: Notebook
    _spool: Spool
    _own_steps: OwnSteps
    _ring_dir: Path
    _next_number: int
    _call_overhead_ns: int
    _closed: bool

    @abc.abstractmethod
    def end(self) -> None:
        """The process ends: complete what was recorded, remove what was temporary."""

    def engine_numbers(self, engine: Any) -> list[int]:
        """The numbers under which an engine is recorded: one for each of its engine cores; none if it is not."""
        return [recorder.number for recorder in self._recorders_of.get(id(engine), [])]

    def open_engine(self, engine: Any, adapter: Adapter, facts: dict[str, Any]) -> StepFunctions | None:
        """A new engine was built; see `kvhook.hooks.Owner`."""
        with lock:
            if self._closed:
                return None
            if not self._recorders and multiprocessing.parent_process() is not None:
                # children of multiprocessing end without atexit; what it calls instead is cleared when they begin
                multiprocessing.util.Finalize(None, self.end, exitpriority=1)
            if not self._call_overhead_ns:
                self._call_overhead_ns = call_overhead_ns()
            facts = engine_facts(adapter, engine) | facts
            name = class_of_vllm(type(engine)) if self.options.anonymous else type(engine).__qualname__
            facts |= {"hook_call_ns": self._call_overhead_ns, "engine_class": name}
            facts |= {"session": self._core_side.session} | ({ANONYMOUS: True} if self.options.anonymous else {})
            plan = plan_engine(adapter, facts, self.options)
            probe = probe_of(engine, adapter, self._probe_failed) if plan.measure_stats else None
            number = self._next_number
            monitor = OverheadMonitor(
                self._call_overhead_ns, adapter.level, plan.max_overhead, self._step_down_of(engine, number)
            )
            monitor.probe = probe
            self._monitors.append(monitor)
            recorder = Recorder(
                number,
                adapter,
                plan.facts | {STATS_FOR_KVHOOK: probe is not None},
                self._ring_dir,
                self.options.ring_capacity,
                hooks.clock,
                monitor.sample if plan.timed else no_sample,
                self._orphan_of(engine, number),
            )
            if plan.why_other_level:
                recorder.meta["levels"] = [{"step": 0, "level": adapter.level, "why": plan.why_other_level}]
            for warning in plan.warnings:
                log.warning("kvhook: %s", warning)
            self._next_number += 1
            self._recorders[number] = recorder
            self._notebook.begin_ring(recorder.ring.path)
            self._recorders_of.setdefault(id(engine), []).append(recorder)
            try:
                self._adding_up()  # imports what the spool's thread would have to import while the engine works
                self._spool.add(recorder)
            except BaseException:  # the engine is not recorded, and nothing waits for it
                del self._recorders[number]
                self._monitors.remove(monitor)
                self._recorders_of[id(engine)].remove(recorder)
                recorder.close()
                raise
            return recorder.functions

    def _orphan_of(self, engine: Any, number: int) -> Callable[[bool], None]:
        """What is called when an engine's stats had to be published without a step; or with one (`lost`), but the
        outputs of that step were not counted."""
        alive = weakref.ref(engine)

        def orphan(lost: bool) -> None:
            engine, recorder = alive(), self._recorders[number]
            if not lost:
                self._own_steps.without_times(engine, recorder)
            elif engine is not None and hooks.stats_turned_off(engine):  # if not, the engine's own step has failed
                self._own_steps.not_counted(recorder)
                self.count_outputs(engine, False, True)

        return orphan

    def count_outputs(self, engine: Any, exact: bool, stepped: bool) -> StepFunctions | None:
        """Nobody makes iteration stats of an engine's steps; see `kvhook.hooks.Owner`."""
        recorder = next(iter(self._recorders_of.get(id(engine), ())), None)
        if recorder is None:
            return None
        lost = not exact and bool(recorder.functions.left().uncounted)
        begun = 0

        def go_on(adapter: Adapter, counters: Counters) -> StepFunctions:
            nonlocal begun
            begun = counters.step
            return recorder.go_on(adapter, "light", counters)

        functions: StepFunctions | None = None
        try:
            functions = hooks.count_outputs(engine, exact, go_on)
        except USERS:
            raise
        except BaseException as error:
            self.fault("counting the outputs of an engine", error, "the tokens of this engine are not known")
        if lost or functions is None:
            self._own_steps.not_counted(recorder)
        if functions is not None:
            self._monitors[recorder.number].at_light()
            self._own_steps.counted(engine, recorder, begun, stepped)
        return functions

    def not_counted(self, engine: Any) -> None:
        """Outputs came that nobody counted; see `kvhook.hooks.Owner`."""
        for recorder in self._recorders_of.get(id(engine), ())[:1]:
            self._own_steps.not_counted(recorder)

    def _step_down_of(self, engine: Any, number: int) -> Callable[[Level, Counters, float], bool]:
        """What changes an engine to a level that costs less. The engine's thread calls it between two steps."""
        alive = weakref.ref(engine)

        def step_down(level: Level, counters: Counters, share: float) -> bool:
            engine, recorder = alive(), self._recorders.get(number)
            if engine is None or recorder is None:
                return False
            try:
                functions_of = functools.partial(recorder.go_on, level=level.name, start=counters)
                done = hooks.step_down(engine, level.every, functions_of)
            except USERS:
                raise
            except BaseException as error:
                self.fault("stepping down to a level that costs less", error, "the level stays as it is")
                return False
            why = f"kvhook took {share:.2%} of the time inside steps, {self.options.max_overhead:.2%} are allowed"
            change = {"step": counters.step, "level": level.name, "every": level.every, "share": share, "why": why}
            if not done:
                change = recorder.meta["levels"][-1] | {"why": f"{why}; this engine cannot be recorded for less"}
            recorder.meta["levels"] = [*recorder.meta["levels"], change]
            self._spool.write_meta_again(number)
            log.warning("kvhook: %s; from step %d on the level is %s", change["why"], counters.step, change["level"])
            return done

        return step_down

    def _probe_failed(self, error: BaseException) -> None:
        self.fault("measuring what vLLM's stats take", error, "it is not measured any more")

    def label_request(self, engine: Any, request_id: Any, lora_name: str) -> tuple[int, int]:
        """A request was added; see `kvhook.hooks.Owner`."""
        recorder = next(iter(self._recorders_of.get(id(engine), ())), None)
        return self._notebook.label_request(-1 if recorder is None else recorder.number, request_id, lora_name)

    def begin_call(self, engine: Any, call: Call) -> Callable[[], None]:
        """A method of ``LLM`` is about to be called; see `kvhook.hooks.Owner`."""
        return self._notebook.begin_call(self.engine_numbers(engine), call)

    def begin_engine_event(self, engine: Any, told: Told) -> Callable[[str], None]:
        """A call that changes an engine is about to be made; see `kvhook.hooks.Owner`."""
        recorders = list(self._recorders_of.get(id(engine), ()))
        numbers = [r.number for r in recorders]
        recorded = sum(r.ring.head for r in recorders) if told.kind in IN_PIECES else -1
        end = self._notebook.engine_events.begin(
            told.kind, numbers, self._notebook.detail(told.kind, told.detail), recorded
        )
        rest = True if told.kind in RESTS else False if told.kind in ENDS_REST else None

        def ended(outcome: str) -> None:
            end(outcome)
            if outcome == DONE:
                for recorder in recorders:
                    recorder.ring.note_event(CODES[told.kind], rest)

        return ended

    def close_engine(self, engine_id: int) -> None:
        """An engine was deleted; see `kvhook.hooks.Owner`. Finalizers call it, so it must not wait for a lock."""
        for recorder in self._recorders_of.pop(engine_id, []):
            self._spool.retire(recorder.number)

    def _first_errors(self) -> dict[str, str]:
        """What failed first at each place, as files say it."""
        errors = dict(self._faults.first_errors)
        return {where: kind_of_error(error) for where, error in errors.items()} if self.options.anonymous else errors

    def fault(self, where: str, error: BaseException, then: str) -> None:
        """Something in kvhook failed; see `kvhook.hooks.Owner`."""
        if self._faults.fault(where, error, then):
            # the first of its kind: the trace says so too, also if the process is killed
            for number, recorder in list(self._recorders.items()):
                recorder.meta["faults"] = self._first_errors()
                self._spool.write_meta_again(number)

    def is_off(self, where: str) -> bool:
        """Whether a seam is switched off; see `kvhook.hooks.Owner`."""
        return self._faults.is_off(where)
