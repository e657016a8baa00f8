"""What a ring tells about the end of a run: the last steps, what changed before them, and who was still there."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kvhook.text.summary import percent, seconds

if TYPE_CHECKING:
    from kvhook.analysis.summary import Summary
    from kvhook.trace import Trace

    Table = npt.NDArray[np.void]

#: The end of a run: so many steps, or a quarter of what there is if that is less.
LAST = 16
#: Finished requests that are listed.
LAST_REQUESTS = 5
#: A change is worth a word from this factor on (times), or this difference (usage).
FACTOR = 1.5
DIFFERENCE = 0.1


@dataclasses.dataclass(frozen=True)
class Autopsy:
    """The end of a run."""

    #: "killed", "closed" or "alive"
    ended: str
    summary: Summary
    #: the last steps and the requests that finished last, as rows; None is what is not known
    last_steps: list[dict[str, Any]]
    last_requests: list[dict[str, Any]]
    #: what changed before the end, a sentence each
    changes: list[str]
    #: requests in the last step that brought stats; None if there is none
    still_running: int | None
    still_waiting: int | None

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain dictionaries, lists, numbers and None: what ``json.dumps`` takes."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | {"summary": self.summary.as_dict()}


def examine(trace: Trace, ended: str, last: int = 20, engine: int | None = None) -> Autopsy:
    """Look at the end of a run.

    Args:
        trace: what is left of it.
        ended: "killed", "closed" or "alive".
        last: how many steps to list.
        engine: only this engine of it.
    """
    steps, requests = trace.steps(engine), trace.requests(engine)
    with np.errstate(all="ignore"):
        return Autopsy(
            ended=ended,
            summary=trace.summary(engine),
            last_steps=_rows(steps[max(0, len(steps) - last) :], "step"),
            last_requests=_rows(requests[-LAST_REQUESTS:], "request"),
            changes=changes(steps),
            still_running=_last_known(steps, "num_running_reqs"),
            still_waiting=_last_known(steps, "num_waiting_reqs"),
        )


def changes(steps: Table) -> list[str]:
    """What was different in the last steps from the median of those before, in words; empty if nothing was."""
    count = min(LAST, len(steps) // 4)
    if not count:
        return []
    before, end = steps[:-count], steps[-count:]
    told = (
        _step_time(before, end),
        _usage(before, end),
        _waiting(before, end),
        _preemptions(before, end),
        _no_stats(before, end),
    )
    return [sentence for sentence in told if sentence]


def _step_time(before: Table, end: Table) -> str:
    usual, last = (float(np.median(s["t_end_ns"] - s["t_start_ns"])) / 1e9 for s in (before, end))
    longest = float(np.max(end["t_end_ns"] - end["t_start_ns"])) / 1e9
    text = ""
    if usual > 0 and last >= FACTOR * usual:
        text = f"steps became slower: {_median(last, seconds)} over the last {len(end)}, {seconds(usual)} before"
        text += f" ({last / usual:.1f} times)"
    elif usual > 0 and 0 < last <= usual / FACTOR:
        text = f"steps became faster: {_median(last, seconds)} over the last {len(end)}, {seconds(usual)} before"
    if usual > 0 and longest >= 5 * max(usual, last):
        text += f"{'; ' if text else ''}one of the last {len(end)} steps took {seconds(longest)}, "
        text += f"{longest / usual:.0f} times the median"
    return text


def _usage(before: Table, end: Table) -> str:
    usual, values = _known(before, "kv_cache_usage"), _known(end, "kv_cache_usage")
    if not len(usual) or not len(values):
        return ""
    median, last = float(np.median(usual)), float(values[-1])
    if abs(last - median) >= DIFFERENCE:
        verb = "rose" if last > median else "fell"
        return f"KV cache usage {verb} from {_median(median, percent)} to {percent(last)} in the last step"
    if last >= 0.95:
        return f"the KV cache was full: {percent(last)} in the last step, {_median(median, percent)} before"
    return ""


def _waiting(before: Table, end: Table) -> str:
    usual, values = _known(before, "num_waiting_reqs"), _known(end, "num_waiting_reqs")
    if not len(usual) or not len(values):
        return ""
    median, last = float(np.median(usual)), int(values[-1])
    if last > max(2.0, FACTOR * median):
        return f"the queue grew: {last:,} requests waited in the last step, {_median(median, '{:,.0f}'.format)} before"
    if median >= 2 and last < median / FACTOR:
        return (
            f"the queue shrank: {last:,} requests waited in the last step, {_median(median, '{:,.0f}'.format)} before"
        )
    return ""


def _preemptions(before: Table, end: Table) -> str:
    if "num_preempted_reqs" not in (end.dtype.names or ()):
        return ""
    last, earlier = int(end["num_preempted_reqs"].sum()), int(before["num_preempted_reqs"].sum())
    if last <= 0 or last / len(end) < FACTOR * earlier / len(before):
        return ""
    return f"{last:,} preemptions in the last {len(end)} steps, {earlier:,} in the {len(before):,} before"


def _no_stats(before: Table, end: Table) -> str:
    silent = int((end["has_scheduler_stats"] != 1).sum())
    if silent and silent / len(end) > 2 * (before["has_scheduler_stats"] != 1).mean():
        return f"{silent} of the last {len(end)} steps brought no stats"
    return ""


def _median(value: float, text: Any) -> str:
    return f"a median of {text(value)}"


def _known(steps: Table, name: str) -> npt.NDArray[np.float64]:
    if name not in (steps.dtype.names or ()):
        return np.empty(0)
    values = steps[steps["has_scheduler_stats"] == 1][name].astype(np.float64)
    known: npt.NDArray[np.float64] = values[np.isfinite(values)]
    return known


def _last_known(steps: Table, name: str) -> int | None:
    values = _known(steps, name)
    return int(values[-1]) if len(values) else None


def _rows(table: Table, kind: str) -> list[dict[str, Any]]:
    from kvhook.export.rows import as_rows

    return as_rows(table, kind)
