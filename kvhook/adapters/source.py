"""From a plan of columns to the publisher's Python source: what runs in every step where the extension is not there.

It is generated, because reading 40 attributes in a straight line takes 0.3 us and a loop over names with ``getattr``
1.5 us. What comes out can be read: ``compile_publisher(...).source``, and in ``tests/golden`` for some releases of
vLLM. Its shape (the state of the functions lives in the local variables of ``bind``)::

    def bind(publish_record, pack_step, pack_request, pack_values, clock, on_sample, orphan, n, step, request_number):
        def take(scheduler_stats, ...): ...  # what the engine core sent, once per step
        def record(scheduler_stats=None, iteration_stats=None, mm_cache_stats=None, engine_idx=0, **_): ...  # as vLLM
        def publish(t_start_ns, t_end_ns): ...
        def add(): ...
        def abort(request): ...
        def flush(): ...
        def left(): ...
        return record, publish, take, add, abort, flush, left

`kvhook.adapters.program` makes the same of a plan for the extension. Whoever changes one changes the other: a test
compares what the two record.
"""

from __future__ import annotations

from kvhook.adapters.columns import ENGINE_INDEX, PREFIXES, ColumnPlan
from kvhook.adapters.shape import MEASURE_EVERY, Shape, blank_of, root_of
from kvhook.ring.layout import Layout
from kvhook.schema import REQUEST, STEP, VALUE_SERIES, VALUES


class SourceWriter(Shape):
    """Writes the publisher's source."""

    def __init__(self, plan: ColumnPlan, layout: Layout) -> None:
        super().__init__(plan, layout)
        self.lines: list[str] = []

    @property
    def uncounted(self) -> str:
        """True if there are outputs whose tokens nobody has counted."""
        return f"num_outputs and {self.counts} is None" if self.counts else ""

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
        lost = self.uncounted if self.taken() else ""
        if lost:
            self.add(2, f"lost = {lost} and {self.taken()[0].name} is not None")
        for root in self.roots:
            self.root(root)
        for series, expression in self.plan.lists.items():
            self.list(series, expression)
        if self.plan.finished:
            self.requests()
        self.aborted()
        self.add(2, f"n = publish_record(n, pack_step(n, {STEP}, ENGINE, {', '.join(self.step_cells())}))")
        self.add(2, "kvhook_ns = vllm_stats_ns = num_free_kv_blocks = -1")
        self.add(2, "pending = num_added_reqs = scheduler_stats_logged = 0")
        self.add(2, f"{' = '.join(self.roots)} = None")
        self.add(2, "step += 1")
        self.add(2, f"if step % {MEASURE_EVERY} == 1:")
        self.add(3, "kvhook_ns = clock() - t_end_ns + spent_ns")
        self.add(3, "vllm_stats_ns = on_sample(n, step, request_number, t_start_ns, t_end_ns, kvhook_ns)")
        if lost:
            self.add(2, "if lost:")
            self.add(3, "orphan(True)")
        self.lines[-1] += "\n"
        self.between_steps()
        self.add(1, "return record, publish, take, add, abort, flush, left")
        return "\n".join(self.lines) + "\n"

    def take(self) -> None:
        """The function that is given what the engine core sent, once per step."""
        given = self.taken()
        arguments = "".join(f"{s.argument}=None, " for s in given)
        names = "".join(f", {s.name}" for s in given)
        self.add(1, f"def take({arguments}engine_idx=0, spent=0, num_free=-1, outputs=0):")
        self.add(2, f"nonlocal pending, engine_index, spent_ns, num_free_kv_blocks, num_outputs{names}")
        self.add(2, "if pending:")
        if self.uncounted:
            self.add(3, f"if {self.uncounted}:")
            self.add(4, "return True")
        self.add(3, "flush()")
        self.add(3, "orphan(False)")
        self.add(2, "pending = 1")
        self.add(2, "num_outputs = outputs")
        for source in given:
            self.add(2, f"{source.name} = {source.argument}")
        self.add(2, "num_free_kv_blocks = num_free")
        self.add(2, "spent_ns = spent")
        self.add(2, "engine_index = engine_idx or 0")
        self.add(2, "return False\n")

    def record(self) -> None:
        """The function that is given what vLLM's loggers are given."""
        merge = "merge" in self.plan.names
        arguments = "".join(f"{a}=None, " for a in self.plan.arguments)
        given = self.recorded()
        names = "".join(f", {root}" for root in given)
        self.add(1, f"def record({arguments}spent=0, **_):")
        self.add(2, f"nonlocal pending, engine_index, spent_ns, scheduler_stats_logged{names}")
        self.add(2, "pending = 1")
        for root, argument in given.items():
            merged = f"{argument} if {root} is None else merge({root}, {argument})"
            self.add(2, f"{root} = {merged if merge else argument}")
        self.add(2, f"scheduler_stats_logged = 0 if {self.scheduler_argument() or None} is None else 1")
        if not self.from_core:
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
        self.add(2, "nonlocal num_outputs")
        self.add(2, "if not (pending or aborted):")
        self.add(3, "return False")
        self.add(2, "num_outputs = 0")
        self.add(2, "now = clock()")
        self.add(2, "publish(now, now)")
        self.add(2, "return True\n")
        self.add(1, "def left():")
        uncounted = f"num_outputs if pending and {self.uncounted} else 0" if self.uncounted else "0"
        self.add(2, f"return Left(n, step, request_number, num_added_reqs, tuple(aborted), {uncounted})\n")

    def aborted(self) -> None:
        """One record per aborted request, if this level has requests."""
        cells = self.aborted_cells()
        self.add(2, "if aborted:")
        if cells:
            self.add(3, "for gone in aborted:")
            self.add(4, f"n = publish_record(n, pack_request(n, {REQUEST}, ENGINE, {', '.join(cells)}))")
            self.add(4, "request_number += 1")
        self.add(3, "aborted.clear()")

    def add(self, depth: int, text: str) -> None:
        """One line, so many levels deep."""
        self.lines.append("    " * depth + text)

    def root(self, root: str) -> None:
        """The columns read from one object that vLLM hands over, and from what hangs on it; blanks where it is None."""
        columns = self.columns_of(root)
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
        for child in self.children_of(root):
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
            by_blank.setdefault(blank_of(column), []).append(column)
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
        self.add(2, f"values = {expression} if {root_of(expression)} is not None else ()")
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
        finished, rows = self.plan.finished, self.rows()
        self.add(2, f"finished = {finished} if {root_of(finished)} is not None else ()")
        if rows:
            self.add(2, f"for {', '.join(f'of_{c}' for c in rows)} in {self.zipped_rows()}:")
        else:
            self.add(2, f"for {self.plan.adapter.finished.column} in finished:")
        cells = ", ".join(self.request_cells())
        self.add(3, f"n = publish_record(n, pack_request(n, {REQUEST}, ENGINE, {cells}))")
        self.add(3, "request_number += 1")
