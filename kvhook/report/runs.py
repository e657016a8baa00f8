"""Everything that a report shows of one trace, read in one pass over its records and one over its engine cores'."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kvhook.analysis.core_report import CoreReport, report
from kvhook.analysis.summarize import summary_of
from kvhook.analysis.summary import Summary
from kvhook.analysis.totals import Totals
from kvhook.analysis.values import Values
from kvhook.records.core import CoreRecords
from kvhook.records.engine_events import EngineEvent
from kvhook.records.events import Scope
from kvhook.records.replicas import counted
from kvhook.records.tables import Records, reason_texts
from kvhook.report.buckets import Floats
from kvhook.report.lines import Line, StepLines, core_lines
from kvhook.report.requests import FrontRequests, Shown, core_requests
from kvhook.ring.slots import fields_of, slot_head
from kvhook.schema import REQUEST, STEP

if TYPE_CHECKING:
    from kvhook.ring.layout import Layout
    from kvhook.ring.slots import Slots
    from kvhook.whatif.report import WhatIf

#: A report looks at single blocks if their ledger has no more events than this: it is held in memory as a whole.
MOST_EVENTS = 2_000_000
TOO_MANY_EVENTS = "the ledger of blocks has {:,} events, which is too many for a page: kvhook cache reads it"
#: Points of a distribution's curve.
POINTS = 240
#: Curves that are made of a column of another name -> that column.
MADE_OF = {
    "ttft": "ttft_sum",
    "itl": "itl_sum",
    "hit_rate_window": "prefix_cache_queries",
    "hit_rate_so_far": "prefix_cache_queries",
    "preempted_hit_rate_window": "prefix_cache_preempted_queries",
    "preempted_hit_rate_so_far": "prefix_cache_preempted_queries",
    "connector_hit_rate_window": "connector_prefix_cache_queries",
    "connector_hit_rate_so_far": "connector_prefix_cache_queries",
    "step_time": "t_end_ns",
}


class Share(NamedTuple):
    """A distribution: which share of the values is not larger than each bound."""

    bounds: Floats
    shares: Floats


@dataclasses.dataclass(frozen=True)
class Run:
    """One trace, reduced to what a report shows."""

    name: str
    meta: dict[str, Any]
    summary: Summary
    lines: list[Line]
    requests: Shown
    #: "ttft", "itl", "e2e" -> distribution, of those that there are
    shares: dict[str, Share]
    core: CoreReport | None
    #: why nothing was recorded inside the engine core
    why_no_core: str
    #: why its ledger of blocks was not read, although there is one
    why_no_ledger: str
    core_facts: list[dict[str, Any]]
    scopes: list[Scope] = dataclasses.field(default_factory=list)
    engine_events: list[EngineEvent] = dataclasses.field(default_factory=list)
    #: what other KV caches would have found; or why that is not known
    other_caches: WhatIf | str = "it was not computed"

    @property
    def begin(self) -> float:
        """The moment, on the monotonic clock, from which its times are counted."""
        return min((float(line.begin[0]) for line in self.lines if len(line.begin)), default=0.0)


def read(records: Records, cores: CoreRecords, name: str) -> Run:
    """Read a run.

    Args:
        records: of the front end.
        cores: of its engine cores.
        name: what to call it.
    """
    totals, steps, front = Totals(), StepLines(), FrontRequests()

    def take(slots: Slots, layout: Layout) -> None:
        totals.take(slots, layout)
        _take(slots, layout, steps, front)

    with np.errstate(all="ignore"):
        records.go_over(take)
        events = cores.num_block_events()
        once = cores.of_engines(counted(records.engines.facts()))
        core = report(once, ledger=events <= MOST_EVENTS) if len(once) else None
        summary = summary_of(totals, records, None, core)
        there = {c.name for c in records.columns("step")}
        lines = [_present(line, there) for line in steps.lines()] + list(core_lines(cores))
    shown = _without_absent(front.shown(), {c.name for c in records.columns("request")})
    shown = core_requests(cores) or shown
    together = totals.of()
    values = {**together.steps.latencies, "e2e": together.requests.e2e}
    return Run(
        name,
        records.meta,
        summary,
        lines,
        shown,
        {key: _share(v) for key, v in values.items() if v.count},
        core,
        cores.why_none,
        TOO_MANY_EVENTS.format(events) if events > MOST_EVENTS else "",
        cores.facts,
        records.scopes,
        records.engine_events,
    )


def _take(slots: Slots, layout: Layout, lines: StepLines, front: FrontRequests) -> None:
    head = slot_head(slots)
    for engine in np.unique(head["engine"]).tolist():
        mine = head["engine"] == engine
        requests = slots[mine & (head["kind"] == REQUEST)]
        if len(requests):
            front.take_requests(engine, _with_engine(fields_of(requests, layout.columns["request"]), engine))
        steps = fields_of(slots[mine & (head["kind"] == STEP)], layout.columns["step"])
        lines.take(engine, steps)
        front.take_steps(engine, _with_engine(steps[["step", "t_end_ns"]], engine))


def _with_engine(fields: Any, engine: int) -> Any:
    """Stored fields as a table with ``engine``, and the finish reason as text."""
    types = [("engine", "<i8")]
    types += [(n, "U12" if n == "finish_reason" else fields.dtype[n].str) for n in fields.dtype.names]
    out = np.empty(len(fields), types)
    out["engine"] = engine
    for name in fields.dtype.names:
        out[name] = reason_texts(fields[name]) if name == "finish_reason" else fields[name]
    return out


def _present(line: Line, columns: Iterable[str]) -> Line:
    """A line without what this vLLM does not fill."""
    curves = {name: curve for name, curve in line.curves.items() if MADE_OF.get(name, name) in columns}
    return line._replace(curves=curves)


def _without_absent(shown: Shown, columns: set[str]) -> Shown:
    for name in ("num_prompt_tokens", "num_cached_tokens", "num_generation_tokens", "num_preemptions"):
        if name not in columns:
            shown.timeline.requests[name] = -1
    return shown


def _share(values: Values) -> Share:
    smallest, largest = values.at([0])[0], values.largest
    if not (0 < smallest < largest < np.inf):
        bounds = np.array([largest])
    else:
        bounds = np.geomspace(smallest, largest, POINTS)
        bounds[0], bounds[-1] = smallest, largest
    return Share(bounds, np.array(values.up_to(bounds)) / values.count)
