"""From a plan of columns to the publisher: the only code of kvhook that runs in every step.

There are two, which record the same bytes: generated Python (`kvhook.adapters.source`), and the extension, to which
the plan is handed as data (`kvhook.adapters.program`). The extension is taken where it is there.
"""

from __future__ import annotations

import linecache
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from kvhook import _step
from kvhook.adapters.columns import ColumnPlan
from kvhook.adapters.program import CannotCompile, compile_program
from kvhook.adapters.shape import MEASURE_EVERY as MEASURE_EVERY
from kvhook.adapters.source import SourceWriter
from kvhook.adapters.step_functions import Counters, Left, StepFunctions
from kvhook.adapters.table import Adapter
from kvhook.ring.layout import Layout, make_layout
from kvhook.ring.writer import Publish
from kvhook.schema import LEVELS, REQUEST_FIELDS, STEP_FIELDS, blank

#: ``on_sample(*counters, t_start_ns, t_end_ns, kvhook_ns)`` is called after each step that was measured; it returns
#: the ``vllm_stats_ns`` of the next record.
OnSample = Callable[[int, int, int, int, int, int], int]

log = logging.getLogger("kvhook")


def no_sample(*_: int) -> int:
    """For engines without steps: there is no step time that the cost could be a share of."""
    return -1


class Compiled(NamedTuple):
    """A publisher for one engine: its source, its slot layout, and per kind of record what is absent and why."""

    source: str
    layout: Layout
    absent: dict[str, dict[str, str]]
    #: what the source calls by name: helpers, and facts about the engine
    names: dict[str, Any]
    plan: ColumnPlan

    def bind(
        self,
        publish_record: Publish,
        engine: int,
        clock: Callable[[], int],
        on_sample: OnSample = no_sample,
        start: Counters = Counters(),  # noqa: B008 (it cannot be changed)
        on_orphan: Callable[[bool], None] = lambda _: None,
    ) -> StepFunctions:
        """Make the functions of the step path.

        Args:
            publish_record: stores a packed record (`RingWriter.publish`).
            engine: number of the engine in this process, stored in each slot.
            clock: monotonic nanoseconds.
            on_sample: is called with what kvhook took, after each step in which that was measured.
            start: where to go on, if another publisher has written into the ring before.
            on_orphan: is called with False when stats were published for which no step had come, and with True when a
                step was published whose outputs nobody had counted.
        """
        arguments = (publish_record, engine, clock, on_sample, start, on_orphan)
        if _step.native is not None:
            try:
                return self._bind_native(*arguments)
            except CannotCompile as error:
                # an adapter of somebody else's; those of kvhook are tested to compile
                log.info("kvhook: engine %d is recorded on the step path in Python: %s", engine, error)
        return self._bind_source(*arguments)

    def _packers(self) -> tuple[Any, Any, Any]:
        """What packs a step, a request, and a slot of values."""
        pack_values = self.layout.struct_of("values", tail=f"{self.layout.values_per_slot}d").pack
        return self.layout.struct_of("step").pack, self.layout.struct_of("request").pack, pack_values

    def _bind_native(
        self,
        publish_record: Publish,
        engine: int,
        clock: Callable[[], int],
        on_sample: OnSample,
        start: Counters,
        on_orphan: Callable[[bool], None],
    ) -> StepFunctions:
        assert _step.native is not None
        plan = compile_program(self.plan, self.layout, _step.native)
        pack_step, pack_request, pack_values = self._packers()
        for kind, pack in (("step", pack_step), ("request", pack_request), ("gone", pack_request)):
            plan[kind] = (*plan[kind], pack) if plan[kind] else None
        made = _step.native.Publisher(
            plan | {"pack_values": pack_values},
            publish_record,
            None if clock is time.monotonic_ns else clock,
            None if on_sample is no_sample else on_sample,
            on_orphan,
            Left,
            engine,
            start,
        )
        return StepFunctions(made.record, made.publish, made.take, made.add, made.abort, made.flush, made.left)

    def _bind_source(
        self,
        publish_record: Publish,
        engine: int,
        clock: Callable[[], int],
        on_sample: OnSample,
        start: Counters,
        on_orphan: Callable[[bool], None],
    ) -> StepFunctions:
        name = f"<kvhook publisher of engine {engine}>"
        # so that a traceback out of the generated code shows its lines
        linecache.cache[name] = (len(self.source), None, self.source.splitlines(keepends=True), name)
        scope: dict[str, Any] = {**self.names, "ENGINE": engine, "Left": Left}
        exec(compile(self.source, name, "exec"), scope)
        return StepFunctions(*scope["bind"](publish_record, *self._packers(), clock, on_sample, on_orphan, *start))


def compile_publisher(
    adapter: Adapter, facts: Mapping[str, Any], *, level: str = "", layout: Layout | None = None
) -> Compiled:
    """Make the publisher for the vLLM that is loaded and an engine with these facts.

    Args:
        adapter: the tables of the era.
        facts: what is known of the engine (`kvhook.adapters.config.engine_facts`), and ``finished_hook`` (whether
            that target is patched).
        level: stored in each step; the adapter's own by default.
        layout: of a ring that exists already; columns of it that this adapter does not fill are blank.

    Raises:
        LookupError: a class that vLLM hands over is not where the adapter says.
    """
    plan = ColumnPlan(adapter, facts)
    plan.names["LEVEL"] = LEVELS.index(level or adapter.level)
    if layout is not None:
        fields = {f.name: f for f in STEP_FIELDS}
        for column in layout.columns["step"]:
            plan.steps.setdefault(column.name, blank(fields[column.name]))
    else:
        layout = make_layout(
            {
                "step": tuple(f for f in STEP_FIELDS if f.name in plan.steps),
                "request": tuple(f for f in REQUEST_FIELDS if f.name in plan.requests),
            }
        )
    return Compiled(SourceWriter(plan, layout).text(), layout, plan.absent, plan.names, plan)
