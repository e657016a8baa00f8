"""From a plan of columns to the publisher: the only code of kvhook that runs in every step.

The publisher is generated, because reading 40 attributes in a straight line takes 0.3 us and a loop over names with
``getattr`` 1.5 us. What comes out is plain Python and can be read: ``compile_publisher(...).source``, and in
``tests/golden`` for some releases of vLLM. Its shape (the state of the two functions lives in the local variables of
``bind``)::

    def bind(publish_record, pack_step, pack_request, pack_values, clock, on_sample, orphan, n, step, request_number):
        def take(scheduler_stats, ...): ...  # what the engine core sent, once per step
        def record(scheduler_stats=None, iteration_stats=None, mm_cache_stats=None, engine_idx=0, **_): ...  # as vLLM
        def publish(t_start_ns, t_end_ns): ...
        def add(): ...
        def abort(request): ...
        def flush(): ...
        def left(): ...
        return record, publish, take, add, abort, flush, left
"""

from __future__ import annotations

import linecache
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from kvhook.adapters.columns import ENGINE_INDEX, FROM_CORE, PREFIXES, ColumnPlan
from kvhook.adapters.step_functions import Counters, Left, StepFunctions
from kvhook.adapters.table import Adapter, Source, attributes
from kvhook.ring.layout import Layout, make_layout
from kvhook.ring.writer import Publish
from kvhook.schema import LEVELS, REQUEST, REQUEST_FIELDS, STEP, STEP_FIELDS, VALUE_SERIES, VALUES, blank

#: What `StepFunctions.take` is given by name: the stats, and at level light the counts of the outputs.
TAKEN = ("scheduler_stats", "iteration_stats")
#: The publisher times itself in one of so many steps; the next record carries the result.
MEASURE_EVERY = 8

#: ``on_sample(*counters, t_start_ns, t_end_ns, kvhook_ns)`` is called after each step that was measured; it returns
#: the ``vllm_stats_ns`` of the next record.
OnSample = Callable[[int, int, int, int, int, int], int]


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

    def bind(
        self,
        publish_record: Publish,
        engine: int,
        clock: Callable[[], int],
        on_sample: OnSample = no_sample,
        start: Counters = Counters(),  # noqa: B008 (it cannot be changed)
        on_orphan: Callable[[], None] = lambda: None,
    ) -> StepFunctions:
        """Make the functions of the step path.

        Args:
            publish_record: stores a packed record (`RingWriter.publish`).
            engine: number of the engine in this process, stored in each slot.
            clock: monotonic nanoseconds.
            on_sample: is called with what kvhook took, after each step in which that was measured.
            start: where to go on, if another publisher has written into the ring before.
            on_orphan: is called when stats were published for which no step had come.
        """
        name = f"<kvhook publisher of engine {engine}>"
        # so that a traceback out of the generated code shows its lines
        linecache.cache[name] = (len(self.source), None, self.source.splitlines(keepends=True), name)
        scope: dict[str, Any] = {**self.names, "ENGINE": engine, "Left": Left}
        exec(compile(self.source, name, "exec"), scope)
        pack_values = self.layout.struct_of("values", tail=f"{self.layout.values_per_slot}d").pack
        pack_step, pack_request = (self.layout.struct_of(kind).pack for kind in ("step", "request"))
        return StepFunctions(
            *scope["bind"](publish_record, pack_step, pack_request, pack_values, clock, on_sample, on_orphan, *start)
        )


def compile_publisher(
    adapter: Adapter, facts: Mapping[str, Any], *, level: str = "", layout: Layout | None = None
) -> Compiled:
    """Generate the publisher for the vLLM that is loaded and an engine with these facts.

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
        return Compiled(_SourceWriter(plan, layout).text(), layout, plan.absent, plan.names)
    layout = make_layout(
        {
            "step": tuple(f for f in STEP_FIELDS if f.name in plan.steps),
            "request": tuple(f for f in REQUEST_FIELDS if f.name in plan.requests),
        }
    )
    return Compiled(_SourceWriter(plan, layout).text(), layout, plan.absent, plan.names)


class _SourceWriter:
    """Writes the publisher's source from a plan of columns."""

    def __init__(self, plan: ColumnPlan, layout: Layout) -> None:
        self.plan, self.layout = plan, layout
        self.fields = {f.name: f for f in STEP_FIELDS}
        # objects that vLLM hands over, as against those that hang on another, and the items of the finished list
        self.roots: dict[str, Source] = {s.name: s for s in plan.sources.values() if s.argument}
        # columns read from vLLM's objects, with the objects that each needs
        self.reads = {
            column: {name for name, _ in attributes(expression)}
            for column, expression in plan.steps.items()
            if attributes(expression)
        }
        self.from_core = bool(plan.facts.get(FROM_CORE))
        # outputs whose tokens nobody has counted; the counts of level light come with the outputs themselves
        counts = next((s.name for s in self.roots.values() if "has_iteration_stats" in s.flags), "")
        self.uncounted = f"num_outputs and {counts} is None" if counts and plan.adapter.level == "full" else ""
        self.lines: list[str] = []

    def text(self) -> str:
        """The whole source."""
        roots = ", ".join(self.roots)
        arguments = "publish_record, pack_step, pack_request, pack_values, clock, on_sample, orphan"
        self.add(0, f"def bind({arguments}, n, step, request_number):")
        self.add(1, "pending = engine_index = spent_ns = num_added_reqs = scheduler_stats_logged = num_outputs = 0")
        self.add(1, "kvhook_ns = vllm_stats_ns = num_free_kv_blocks = -1")
        self.add(1, "aborted = []")
        self.add(1, f"{' = '.join(self.roots)} = None\n")
        self.take()
        self.record()
        self.values()
        self.add(1, "def publish(t_start_ns, t_end_ns):")
        self.add(2, "nonlocal n, step, request_number, kvhook_ns, vllm_stats_ns, num_free_kv_blocks")
        self.add(2, f"nonlocal pending, num_added_reqs, scheduler_stats_logged, {roots}")
        self.add(2, "num_aborted_reqs = len(aborted)")
        for root in self.roots:
            self.root(root)
        for series, expression in self.plan.lists.items():
            self.list(series, expression)
        if self.plan.finished:
            self.requests()
        self.aborted()
        cells = ", ".join(self.cell(c.name) for c in self.layout.columns["step"])
        self.add(2, f"n = publish_record(n, pack_step(n, {STEP}, ENGINE, {cells}))")
        self.add(2, "kvhook_ns = vllm_stats_ns = num_free_kv_blocks = -1")
        self.add(2, "pending = num_added_reqs = scheduler_stats_logged = 0")
        self.add(2, f"{' = '.join(self.roots)} = None")
        self.add(2, "step += 1")
        self.add(2, f"if step % {MEASURE_EVERY} == 1:")
        self.add(3, "kvhook_ns = clock() - t_end_ns + spent_ns")
        self.add(3, "vllm_stats_ns = on_sample(n, step, request_number, t_start_ns, t_end_ns, kvhook_ns)\n")
        self.between_steps()
        self.add(1, "return record, publish, take, add, abort, flush, left")
        return "\n".join(self.lines) + "\n"

    def take(self) -> None:
        """The function that is given what the engine core sent, once per step."""
        given = [s for s in self.roots.values() if s.argument in TAKEN] if self.from_core else []
        arguments = "".join(f"{s.argument}=None, " for s in given)
        names = "".join(f", {s.name}" for s in given)
        self.add(1, f"def take({arguments}engine_idx=0, spent=0, num_free=-1, outputs=0):")
        self.add(2, f"nonlocal pending, engine_index, spent_ns, num_free_kv_blocks, num_outputs{names}")
        self.add(2, "if pending:")
        if self.uncounted:
            self.add(3, f"if {self.uncounted}:")
            self.add(4, "return True")
        self.add(3, "flush()")
        self.add(3, "orphan()")
        self.add(2, "pending = 1")
        self.add(2, "num_outputs = outputs")
        for source in given:
            self.add(2, f"{source.name} = {source.argument}")
        self.add(2, "num_free_kv_blocks = num_free")
        self.add(2, "spent_ns = spent")
        self.add(2, "engine_index = engine_idx or 0")
        self.add(2, "return False\n")

    def record(self) -> None:
        """The function that is given what vLLM's loggers are given. What the engine core sent is not taken twice."""
        taken = TAKEN[:1] if self.from_core else ()
        merge = "merge" in self.plan.names
        arguments = "".join(f"{a}=None, " for a in self.plan.arguments)
        given = {root: s.argument for root, s in self.roots.items() if s.argument not in taken}
        names = "".join(f", {root}" for root in given)
        self.add(1, f"def record({arguments}spent=0, **_):")
        self.add(2, f"nonlocal pending, engine_index, spent_ns, scheduler_stats_logged{names}")
        self.add(2, "pending = 1")
        for root, argument in given.items():
            merged = f"{argument} if {root} is None else merge({root}, {argument})"
            self.add(2, f"{root} = {merged if merge else argument}")
        first = next((s.argument for s in self.roots.values() if "has_scheduler_stats" in s.flags), "None")
        self.add(2, f"scheduler_stats_logged = 0 if {first} is None else 1")
        if not taken:
            self.add(2, "spent_ns = spent")
            self.add(2, f"engine_index = {ENGINE_INDEX} or 0")
        self.lines[-1] += "\n"

    def between_steps(self) -> None:
        """What happens between steps: requests are added and aborted, and what waits for a step may be flushed."""
        self.add(1, "def add():")
        self.add(2, "nonlocal num_added_reqs")
        self.add(2, "num_added_reqs += 1\n")
        self.add(1, "abort = aborted.append\n")
        self.add(1, "def flush():")
        self.add(2, "if not (pending or aborted):")
        self.add(3, "return False")
        self.add(2, "now = clock()")
        self.add(2, "publish(now, now)")
        self.add(2, "return True\n")
        self.add(1, "def left():")
        uncounted = f"num_outputs if pending and {self.uncounted} else 0" if self.uncounted else "0"
        self.add(2, f"return Left(n, step, request_number, num_added_reqs, tuple(aborted), {uncounted})\n")

    def aborted(self) -> None:
        """One record per aborted request, if this level has requests."""
        columns = self.layout.columns["request"]
        self.add(2, "if aborted:")
        if self.plan.requests and columns:
            known = {"request": "request_number", "step": "step"}
            cells = ", ".join(known.get(c.name, f"gone.{c.name}") for c in columns)
            self.add(3, "for gone in aborted:")
            self.add(4, f"n = publish_record(n, pack_request(n, {REQUEST}, ENGINE, {cells}))")
            self.add(4, "request_number += 1")
        self.add(3, "aborted.clear()")

    def add(self, depth: int, text: str) -> None:
        self.lines.append("    " * depth + text)

    def cell(self, column: str) -> str:
        """What is packed for a column: a variable that was set before, or an expression over such variables."""
        if column == "num_finished_reqs" and column in self.reads:
            return f"{column} + num_aborted_reqs"  # counted from the outputs, in which no aborted request is
        return column if column in self.reads else self.plan.steps[column]

    def root(self, root: str) -> None:
        """The columns read from one object that vLLM hands over, and from what hangs on it; blanks where it is None."""
        children = [s for s in self.plan.sources.values() if s.expression.startswith(f"{root}.")]
        family = {root, *(c.name for c in children)}
        columns = [c for c, sources in self.reads.items() if sources & family]
        flags = self.roots[root].flags
        if not columns and not flags:
            return
        self.add(2, f"if {root} is None:")
        self.blanks(3, columns)
        for flag in flags:
            self.add(3, f"{flag} = 0")
        self.add(2, "else:")
        for flag in flags:
            self.add(3, f"{flag} = 1")
        for column in columns:
            if self.reads[column] == {root}:
                self.add(3, f"{column} = {self.plan.steps[column]}")
        for child in children:
            self.child(
                child.name, child.expression, [c for c in columns if child.name in self.reads[c]], child.optional
            )

    def child(self, name: str, expression: str, columns: list[str], optional: bool) -> None:
        """The columns read from an object that hangs on another."""
        if not columns:
            return
        self.add(3, f"{name} = {expression}")
        if optional:
            self.add(3, f"if {name} is None:")
            self.blanks(4, columns)
            self.add(3, "else:")
        for column in columns:
            self.add(4 if optional else 3, f"{column} = {self.plan.steps[column]}")

    def blanks(self, depth: int, columns: list[str]) -> None:
        """Set columns to what they hold when the object they come from did not come."""
        by_blank: dict[str, list[str]] = {}
        for column in columns:
            by_blank.setdefault(blank(self.fields[column]), []).append(column)
        for value, alike in by_blank.items():
            self.add(depth, f"{' = '.join(alike)} = {value}")

    def list(self, series: str, expression: str) -> None:
        """Count, sum, smallest and largest of a list; and the single values, where they do not follow from these.

        A batch moves together, so most lists of inter-token latencies hold one value again and again. ``sorted``
        finds that out in 1.3 us at 256 values (equal floats are one pass), where ``sum`` takes 1.1 and ``max`` 4.2;
        it replaces both, and the exact distribution costs nothing more.
        """
        prefix = PREFIXES[series]
        low, high, count, total = (f"{prefix}_{what}" for what in ("min", "max", "count", "sum"))
        self.add(2, f"values = {expression} if {_root(expression)} is not None else ()")
        self.add(2, f"{count} = len(values)")
        self.add(2, f"if {count} == 1:")
        self.add(3, f"{low} = {high} = {total} = values[0]")
        self.add(2, f"elif {count}:")
        self.add(3, "values = sorted(values)")
        self.add(3, f"{low} = values[0]")
        self.add(3, f"{high} = values[-1]")
        self.add(3, f"if {low} == {high}:")
        self.add(4, f"{total} = {high} * {count}")
        self.add(3, "else:")
        self.add(4, f"{total} = sum(values)")
        self.add(4, f"if {count} > 2:")
        self.add(5, f"publish_values({VALUE_SERIES.index(series)}, values)")
        self.add(2, "else:")
        self.add(3, f"{low} = {high} = {total} = 0.0")

    def values(self) -> None:
        """The function that stores a list of values, in as many slots as it takes."""
        room = self.layout.values_per_slot
        self.add(1, "def publish_values(series, values):")
        self.add(2, "nonlocal n")
        self.add(2, f"for i in range(0, len(values), {room}):")
        self.add(3, f"chunk = values[i : i + {room}]")
        self.add(3, "count = len(chunk)")
        self.add(3, f"chunk += [0.0] * ({room} - count)")
        self.add(3, f"n = publish_record(n, pack_values(n, {VALUES}, ENGINE, step, series, count, *chunk))\n")

    def requests(self) -> None:
        """One record per finished request, before the step's own: who sees the step sees its requests."""
        item, finished = self.plan.adapter.finished.column, self.plan.finished
        self.add(2, f"finished = {finished} if {_root(finished)} is not None else ()")
        cells = {c.name: self.plan.requests[c.name] for c in self.layout.columns["request"]}
        if item in self.plan.sources:
            self.add(2, f"for {item} in finished:")
        else:
            missing = {f.name: "nan" if f.type == "f8" else "-1" for f in REQUEST_FIELDS}
            lists = {c: f"fit({e}, len(finished), {missing[c]})" for c, e in cells.items() if attributes(e)}
            together = f"zip({', '.join(lists.values())}) if finished else ()"
            self.add(2, f"for {', '.join(f'of_{c}' for c in lists)} in {together}:")
            cells |= {c: f"of_{c}" for c in lists}
        self.add(3, f"n = publish_record(n, pack_request(n, {REQUEST}, ENGINE, {', '.join(cells.values())}))")
        self.add(3, "request_number += 1")


def _root(expression: str) -> str:
    """The object that an expression begins with."""
    return sorted(name for name, _ in attributes(expression))[0]
