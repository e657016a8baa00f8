"""What the records of an engine are made of, in which order: what its two publishers, in Python and in C, agree on."""

from __future__ import annotations

from kvhook.adapters.columns import FROM_CORE, ColumnPlan
from kvhook.adapters.table import Source, attributes
from kvhook.ring.layout import Layout
from kvhook.schema import REQUEST_FIELDS, STEP_FIELDS, blank

#: What `StepFunctions.take` is given by name: the stats, and at level light the counts of the outputs.
TAKEN = ("scheduler_stats", "iteration_stats")
#: The publisher times itself in one of so many steps; the next record carries the result.
MEASURE_EVERY = 8


class Shape:
    """The parts of a publisher.

    Attributes:
        plan, layout: which columns there are, from what; and where each goes.
        roots: objects that vLLM hands over, as against those that hang on another and the items of the finished list.
        reads: columns read from vLLM's objects, each with the names of the objects that it needs.
        from_core: whether the scheduler's stats are taken from the engine core's outputs.
        counts: the root whose absence means that nobody has counted the outputs; "" where the counts come with the
            outputs themselves, as at level light.
    """

    def __init__(self, plan: ColumnPlan, layout: Layout) -> None:
        self.plan, self.layout = plan, layout
        self.roots: dict[str, Source] = {s.name: s for s in plan.sources.values() if s.argument}
        self.reads = {
            column: {name for name, _ in attributes(expression)}
            for column, expression in plan.steps.items()
            if attributes(expression)
        }
        self.from_core = bool(plan.facts.get(FROM_CORE))
        counts = next((s.name for s in self.roots.values() if "has_iteration_stats" in s.flags), "")
        self.counts = counts if plan.adapter.level == "full" else ""

    def taken(self) -> list[Source]:
        """The roots that `StepFunctions.take` is given."""
        return [s for s in self.roots.values() if s.argument in TAKEN] if self.from_core else []

    def recorded(self) -> dict[str, str]:
        """Root -> the argument of ``record`` that it is taken from. What the engine core sent is not taken twice."""
        taken = TAKEN[:1] if self.from_core else ()
        return {root: s.argument for root, s in self.roots.items() if s.argument not in taken}

    def scheduler_argument(self) -> str:
        """The argument of ``record`` that brings the scheduler's stats; "" if none does."""
        return next((s.argument for s in self.roots.values() if "has_scheduler_stats" in s.flags), "")

    def children_of(self, root: str) -> list[Source]:
        """The objects that hang on a root."""
        return [s for s in self.plan.sources.values() if s.expression.startswith(f"{root}.")]

    def columns_of(self, root: str) -> list[str]:
        """The columns that are read from a root and from what hangs on it."""
        family = {root, *(c.name for c in self.children_of(root))}
        return [c for c, sources in self.reads.items() if sources & family]

    def cell(self, column: str) -> str:
        """What is packed for a column: a variable that was set before, or an expression over such variables."""
        if column == "num_finished_reqs" and column in self.reads:
            return f"{column} + num_aborted_reqs"  # counted from the outputs, in which no aborted request is
        return column if column in self.reads else self.plan.steps[column]

    def step_cells(self) -> list[str]:
        """What is packed for a step, column by column."""
        return [self.cell(c.name) for c in self.layout.columns["step"]]

    def aborted_cells(self) -> list[str]:
        """What is packed for a request that was aborted; none if this level has no requests."""
        known = {"request": "request_number", "step": "step", "t_end_ns": "t_end_ns"}
        columns = self.layout.columns["request"] if self.plan.requests else ()
        return [known.get(c.name, f"gone.{c.name}") for c in columns]

    def request_cells(self) -> list[str]:
        """What is packed for a finished request."""
        rows = self.rows()
        cells = {c.name: self.plan.requests[c.name] for c in self.layout.columns["request"]}
        return [f"of_{c}" if c in rows else e for c, e in cells.items()]

    def rows(self) -> dict[str, str]:
        """Where requests come as lists of the same length instead of objects: column -> its list, as long as the list
        of finished requests."""
        if self.plan.adapter.finished.column in self.plan.sources:
            return {}
        missing = {f.name: "nan" if f.type == "f8" else "-1" for f in REQUEST_FIELDS}
        cells = {c.name: self.plan.requests[c.name] for c in self.layout.columns["request"]}
        return {c: f"fit({e}, len(finished), {missing[c]})" for c, e in cells.items() if attributes(e)}

    def zipped_rows(self) -> str:
        """These lists as one row per request."""
        return f"zip({', '.join(self.rows().values())}) if finished else ()"


def blank_of(column: str) -> str:
    """What a column of a step holds when the object it is read from did not come."""
    return blank(_FIELDS[column])


_FIELDS = {f.name: f for f in STEP_FIELDS}


def root_of(expression: str) -> str:
    """The object that an expression begins with."""
    return sorted(name for name, _ in attributes(expression))[0]
