"""Engines that are driven by another ``step`` than vLLM's own.

A framework may copy ``LLMEngine.step``, or call the engine core itself. Then nobody makes vLLM's iteration stats, and
the tokens of a step would be unknown. They are counted from the engine core's outputs instead, as at level light.

It shows only when the second outputs come, and the first have not been counted by then. So that those are not lost,
the first outputs of each engine are counted as well, by `FirstOutputs`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvhook.adapters.light import Counter, Counts
from kvhook.adapters.requests import aborted_v1
from kvhook.adapters.step_functions import StepFunctions
from kvhook.faults import USERS
from kvhook.hooks.quiet import do_nothing
from kvhook.overlays import Overlay

#: Changes an engine to counting. Is told whether all outputs so far can still be counted, and whether vLLM's own step
#: has run; returns the functions that record it from then on, or None if it cannot be done.
CountOutputs = Callable[[bool, bool], "StepFunctions | None"]


def size_of(processor: Any, failed: Callable[[BaseException], None]) -> int:
    """How many requests an output processor has; 0, and `failed` is told, where that cannot be known."""
    try:
        return len(processor.request_states)
    except USERS:
        raise
    except BaseException as error:
        failed(error)
        return 0


class OutputCounts:
    """Counts what the engine core sends, whoever asks for it and whoever processes it.

    Args:
        processor: the engine's output processor.
        count: the counter that fits this vLLM (`kvhook.adapters.light.make_counter`).
        failed: is called with an error of kvhook's.
    """

    def __init__(self, processor: Any, count: Counter, failed: Callable[[BaseException], None]) -> None:
        self._processor, self._count, self._failed = processor, count, failed
        self._latest: Counts | None = None
        self._latest_outputs: Any = ()
        self._processed = False

    def look(self, outputs: Any) -> Counts | None:
        """What there is to count in outputs that have just come, before they are processed; None if nothing."""
        self._latest, self._latest_outputs, self._processed = None, outputs.outputs, False
        if not outputs.outputs:
            return None
        states, counts = self._processor.request_states, Counts()
        self._count(outputs.outputs, states, counts)
        # as the engine core sees it; corrected if the outputs are processed: a stop string is found there
        ended = [each for each in outputs.outputs if each.finish_reason is not None and each.request_id in states]
        counts.num_finished_reqs = len(ended)
        self._latest = counts
        return counts

    def around(self, process_outputs: Callable[..., Any]) -> Callable[..., Any]:
        """``process_outputs``, with the requests counted that it finishes."""

        def process_outputs_and_count(*args: Any, **kwargs: Any) -> Any:
            before = size_of(self._processor, self._failed)
            result = process_outputs(*args, **kwargs)
            counts = self._latest
            if counts is not None and self._are_latest(*args, **kwargs):
                finished = before - size_of(self._processor, self._failed)
                counts.num_finished_reqs = finished + (counts.num_finished_reqs if self._processed else 0)
                self._processed = True
            return result

        return process_outputs_and_count

    def _are_latest(self, engine_core_outputs: Any, *_: Any, **__: Any) -> bool:
        """Whether these outputs, or the first of them, came last. A loop may process what came before."""
        if engine_core_outputs is self._latest_outputs:
            return True
        try:
            items = iter(engine_core_outputs)
            if items is engine_core_outputs:
                return True  # an iterator, which vLLM has gone through: nothing can be seen in it any more
            first = next(items, None)
            return first is not None and any(each is first for each in self._latest_outputs)
        except USERS:
            raise
        except BaseException as error:
            self._failed(error)
            return False


class FirstOutputs:
    """Looks at the first outputs of an engine, until it is known that vLLM's own step counts them.

    Args:
        engine: the engine.
        functions: what records the engine so far.
        count_outputs: changes it to counting.
        counts: counts its outputs; None where that cannot be done.
        settled: is called when it looks no further.
    """

    def __init__(
        self,
        engine: Any,
        functions: StepFunctions,
        count_outputs: CountOutputs,
        counts: OutputCounts | None,
        settled: Callable[[], None] = do_nothing,
    ) -> None:
        self._settled = settled
        self._functions, self._count_outputs, self._counts = functions, count_outputs, counts
        self._processor: Any = getattr(engine, "output_processor", None)
        #: what is in the place of ``process_outputs``
        self._overlay: Overlay | None = None
        #: what was taken of the outputs before: arguments of `StepFunctions.take`
        self._before: tuple[Any, ...] | None = None
        self.watching = False

    def begin(self) -> None:
        """Look from now on. Comes last when an engine is tapped: `stop` must find its own function in place."""
        if self._counts is not None:
            method = self._counts.around(self._processor.process_outputs)
            self._overlay = Overlay(self._processor, "process_outputs", method)
            self.watching = True

    def take(self, outputs: Any, num_free: int) -> None:
        """In place of `StepFunctions.take`, for outputs that have just come."""
        stats, rank = outputs.scheduler_stats, getattr(outputs, "engine_index", 0)
        size, counts = len(outputs.outputs), self._counts
        if self._functions.take(stats, None, rank, 0, num_free, size):
            functions = self._change()
            if functions is not None and counts is not None:
                functions.take(stats, counts.look(outputs), rank, 0, num_free)
                return
            self._functions.flush()
            self._functions.take(stats, None, rank, 0, num_free, size)
        elif self._before is not None and self._before[-1]:
            self.stop()
        if self.watching and counts is not None:
            self._before = (stats, counts.look(outputs), rank, 0, num_free, size)

    def ended(self, outputs: Any) -> None:
        """The engine core sent outputs without stats: it ended requests itself (sleep, shutdown, a request that it
        refuses). LLMEngine gives what it makes of them to no logger."""
        states = self._processor.request_states
        for output in outputs.outputs:
            state = states.get(output.request_id)
            if state is not None and output.finish_reason is not None:
                self._functions.abort(aborted_v1(state)._replace(finish_reason=int(output.finish_reason)))

    def flush(self) -> bool:
        """In place of `StepFunctions.flush`: what waits may be outputs that nobody has counted."""
        if self.watching and self._functions.left().uncounted:
            functions = self._change()
            if functions is not None:
                return functions.flush()
        return self._functions.flush()

    def publish(self, t_start_ns: int, t_end_ns: int) -> None:
        """In place of `StepFunctions.publish`: vLLM's own step has run. If it made no iteration stats although stats
        and outputs came, somebody has turned them off."""
        before = self._before
        if self.watching and before is not None and before[0] is not None and self._functions.left().uncounted:
            self._change(stepped=True)
        self._functions.publish(t_start_ns, t_end_ns)

    def stop(self) -> None:
        """Look no further; put back what was there, if nobody has put something over it."""
        if not self.watching or self._overlay is None or not self._overlay.is_on_top():
            return  # tried again with the next outputs: what measures single steps is there for one step
        self._overlay.take_out()
        self.watching, self._before = False, None
        self._settled()

    def end(self) -> None:
        """Look no further, and put back what was there, whatever has been put over it."""
        if self._overlay is not None:
            self._overlay.take_out()
        self.watching, self._before = False, None

    def _change(self, stepped: bool = False) -> StepFunctions | None:
        """From here on outputs are counted; those that were not, belong to the first record of that kind."""
        before, self._before = (self._before, None) if self.watching else (None, None)
        functions = self._count_outputs(before is not None, stepped)
        if functions is not None:
            self._functions = functions
        if functions is not None and before is not None:
            functions.take(*before[:-1])
        return functions
