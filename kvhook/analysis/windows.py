"""A run in equal windows of time: the numbers of its summary, for each part of it.

A step belongs to the window in which it ended, and so does what it brought: look-ups, latencies, finished requests.
Each window is added up as a whole run is, so that a number means the same in both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvhook.analysis.summarize import summary_of
from kvhook.analysis.summary import Summary
from kvhook.analysis.totals import Totals
from kvhook.errors import KvhookError
from kvhook.ring.slots import fields_of, slot_head
from kvhook.schema import KINDS

if TYPE_CHECKING:
    from kvhook.records.tables import Records
    from kvhook.ring.layout import Layout
    from kvhook.ring.slots import Slots

#: More windows than these nobody can look at.
MOST_WINDOWS = 1000


class Number(NamedTuple):
    """A number of each window: its name, what people call it, its unit ("count", "share", "rate" or "s"), and how it is
    read from a summary."""

    name: str
    label: str
    unit: str
    read: Callable[[Summary], float | None]


def _hit_rate(s: Summary) -> float | None:
    return None if s.prefix_caching is False else s.prefix_cache_hit_rate


NUMBERS: tuple[Number, ...] = (
    Number("steps", "steps", "count", lambda s: s.steps),
    Number("kv_cache_usage_mean", "KV usage mean", "share", lambda s: s.kv_cache_usage_mean),
    Number("kv_cache_usage_peak", "KV usage peak", "share", lambda s: s.kv_cache_usage_peak),
    Number("num_running_reqs_mean", "running mean", "rate", lambda s: s.num_running_reqs_mean),
    Number("num_waiting_reqs_mean", "waiting mean", "rate", lambda s: s.num_waiting_reqs_mean),
    Number("prefix_cache_hit_rate", "prefix cache hit rate", "share", _hit_rate),
    Number("prompt_tokens_per_second", "prompt per s in steps", "rate", lambda s: s.prompt_tokens_per_second),
    Number(
        "generation_tokens_per_second", "generated per s in steps", "rate", lambda s: s.generation_tokens_per_second
    ),
    Number("num_preempted_reqs", "preemptions", "count", lambda s: s.num_preempted_reqs),
    Number("num_finished_reqs", "finished requests", "count", lambda s: s.num_finished_reqs),
    Number("step_time_p50", "step time p50", "s", lambda s: s.step_time.p50),
    Number("step_time_p99", "step time p99", "s", lambda s: s.step_time.p99),
    Number("time_to_first_token_p50", "time to first token p50", "s", lambda s: s.time_to_first_token.p50),
    Number("time_to_first_token_p99", "time to first token p99", "s", lambda s: s.time_to_first_token.p99),
    Number("inter_token_latency_p50", "inter-token latency p50", "s", lambda s: s.inter_token_latency.p50),
    Number("inter_token_latency_p99", "inter-token latency p99", "s", lambda s: s.inter_token_latency.p99),
    Number("e2e_latency_p50", "end to end p50", "s", lambda s: s.e2e_latency.p50),
)


@dataclasses.dataclass(frozen=True)
class Windows:
    """A run in windows.

    Attributes:
        edges: where they begin and end, in seconds from the start of the first step; one more than there are windows.
        numbers: name -> its value in each window; NaN where it is not known, or nothing happened that it could be of.
    """

    edges: npt.NDArray[np.float64]
    numbers: dict[str, npt.NDArray[np.float64]]

    def __len__(self) -> int:
        return len(self.edges) - 1

    def as_dict(self) -> list[dict[str, Any]]:
        """One dictionary for each window: "begin", "end", and the numbers. None for what is not known."""
        columns = {"begin": self.edges[:-1], "end": self.edges[1:], **self.numbers}
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        whole = {number.name for number in NUMBERS if number.unit == "count"}
        return [
            {n: None if v != v else int(v) if n in whole else v for n, v in zip(columns, row, strict=True)}
            for row in rows
        ]


def windows_of(records: Records, count: int, engine: int | None = None) -> Windows:
    """Cut a run into windows of equal time, and add each of them up.

    Args:
        records: the run.
        count: how many windows; none come of a run without steps.
        engine: only this engine of it.

    Raises:
        KvhookError: so many windows make no sense.
    """
    if not 1 <= count <= MOST_WINDOWS:
        raise KvhookError(f"a run is cut into 1 to {MOST_WINDOWS:,} windows, not {count:,}")
    steps = records.steps(engine, columns=["engine", "step", "t_start_ns", "t_end_ns"])
    if not len(steps):
        return Windows(np.zeros(1), {number.name: np.zeros(0) for number in NUMBERS})
    begin, end = int(steps["t_start_ns"].min()), int(steps["t_end_ns"].max())
    edges = np.linspace(begin, max(end, begin + 1), count + 1)
    firsts: dict[int, npt.NDArray[np.int64]] = {}
    for one in np.unique(steps["engine"]).tolist():
        mine = steps[steps["engine"] == one]
        # a clock that goes back is a damaged file's; steps are in order all the same
        ends = np.maximum.accumulate(mine["t_end_ns"])
        first = np.searchsorted(ends, edges[:-1], side="right")
        first[0] = 0
        numbers = np.append(mine["step"], mine["step"][-1] + 1)
        firsts[one] = numbers[np.minimum(first, len(mine))]
    totals = [Totals() for _ in range(count)]

    def take(slots: Slots, layout: Layout) -> None:
        which = _windows_of_slots(slots, layout, firsts)
        for one in np.unique(which).tolist():
            if one >= 0:
                totals[one].take(slots[which == one], layout)

    with np.errstate(all="ignore"):
        records.go_over(take)
        summaries = [summary_of(one, records, engine) for one in totals]
    read = {n.name: np.array([_value(n, s) for s in summaries], np.float64) for n in NUMBERS}
    return Windows((edges - begin) / 1e9, read)


def _value(number: Number, summary: Summary) -> float:
    """NaN where it is not known; of a window without steps only counts are."""
    value = number.read(summary) if summary.steps or number.unit == "count" else None
    return float("nan") if value is None else float(value)


def _windows_of_slots(slots: Slots, layout: Layout, firsts: dict[int, npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """The window of each slot, by its engine and step; -1 for what belongs to none."""
    head = slot_head(slots)
    which = np.full(len(slots), -1, np.int64)
    for kind in ("step", "request", "values"):
        of_kind = head["kind"] == KINDS[kind][0]
        if not of_kind.any():
            continue
        step = np.full(len(slots), -1, np.int64)
        names = {c.name for c in layout.columns[kind]}
        if "step" not in names:
            continue
        step[of_kind] = fields_of(slots[of_kind], layout.columns[kind])["step"]
        for engine, first in firsts.items():
            mine = of_kind & (head["engine"] == engine)
            which[mine] = np.maximum(np.searchsorted(first, step[mine], side="right") - 1, 0)
    return which
