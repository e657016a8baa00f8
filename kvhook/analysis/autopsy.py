"""What a ring tells about the end of a run: the last steps, what changed before them, and who was still there."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvhook.analysis.queue import queue_of
from kvhook.analysis.summarize import summarize
from kvhook.analysis.summary import Summary
from kvhook.records.columns import Table, floats, step_seconds, total, with_stats
from kvhook.records.core import CoreRecords
from kvhook.records.rows import as_rows
from kvhook.records.tables import Records

#: The end of a run: so many steps, or a quarter of what there is if that is less.
LAST = 16
#: Finished requests that are listed.
LAST_REQUESTS = 5
#: A change is reported from this factor on (times), or from this difference on (usage).
FACTOR = 1.5
DIFFERENCE = 0.1
#: A single step is reported if it took so many times the median.
OUTLIER = 5
#: Work that is done twice is reported from this share on.
SHARE = 0.05
#: What a change of what limited batches begins with; a value of LIMITS follows.
LIMITED_BY = "limited by "
#: A cache is full from this usage on.
FULL = 0.95


class Change(NamedTuple):
    """Something that was different in the last steps; `kvhook.text.autopsy` puts it into words.

    Args:
        what: "slower", "faster", "longest step", "usage", "full", "queue grew", "queue shrank", "preemptions" or
            "no stats"; from the engine core "computed again", "evictions" or "limited by " and a value of LIMITS.
        before: the median of the steps before (of "preemptions" and "evictions" their sum, of what else the engine core
            tells a share).
        last: the median, the sum or the share of the last steps, or the value in the very last one.
        steps_before: how many steps there were before.
        steps: how many the last steps are.
    """

    what: str
    before: float
    last: float
    steps_before: int
    steps: int


@dataclasses.dataclass(frozen=True)
class Autopsy:
    """The end of a run."""

    #: "killed", "closed" or "alive"
    ended: str
    summary: Summary
    #: the last steps and the requests that finished last, as rows; None is what is not known
    last_steps: list[dict[str, Any]]
    last_requests: list[dict[str, Any]]
    #: what changed before the end
    changes: list[Change]
    #: requests in the last step that brought stats; None if there is none
    still_running: int | None
    still_waiting: int | None

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain dictionaries, lists, numbers and None: what ``json.dumps`` takes."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return plain | {"summary": self.summary.as_dict(), "changes": [c._asdict() for c in self.changes]}


def examine(
    records: Records, ended: str, last: int = 20, engine: int | None = None, cores: CoreRecords | None = None
) -> Autopsy:
    """Look at the end of a run.

    Args:
        records: what is left of it.
        ended: "killed", "closed" or "alive".
        last: how many steps to list.
        engine: only this engine of it.
        cores: what its engine cores recorded.
    """
    steps, requests = records.steps(engine), records.requests(engine)
    with np.errstate(all="ignore"):
        return Autopsy(
            ended=ended,
            summary=summarize(records, engine, cores),
            last_steps=as_rows(steps[max(0, len(steps) - last) :], "step"),
            last_requests=as_rows(requests[-LAST_REQUESTS:], "request"),
            changes=[*changes(steps), *(core_changes(cores.steps()) if cores is not None and len(cores) == 1 else [])],
            still_running=_still_running(steps, requests),
            still_waiting=_last_known(steps, "num_waiting_reqs"),
        )


def changes(steps: Table) -> list[Change]:
    """What was different in the last steps from those before; empty if nothing was."""
    count = min(LAST, len(steps) // 4)
    if not count:
        return []
    before, end = steps[:-count], steps[-count:]
    found = (*_step_time(before, end), *_usage(before, end), *_waiting(before, end), *_preemptions(before, end))
    return [Change(*one, len(before), len(end)) for one in (*found, *_no_stats(before, end))]


def core_changes(steps: Table) -> list[Change]:
    """The same of one engine core: work done twice, evictions, and what kept batches from growing."""
    count = min(LAST, len(steps) // 4)
    if not count:
        return []
    before, end = steps[:-count], steps[-count:]
    found = [*_computed_again(before, end), *_evictions(before, end), *_limits(before, end)]
    return [Change(*one, len(before), len(end)) for one in found]


#: What changed, and its value before and at the end.
_Found = list[tuple[str, float, float]]


def _step_time(before: Table, end: Table) -> _Found:
    """In seconds."""
    times = [step_seconds(s) for s in (before, end)]
    if not all(map(len, times)):
        return []
    usual, last = (float(np.median(seconds)) for seconds in times)
    longest = float(times[1].max())
    found = []
    if usual > 0 and last >= FACTOR * usual:
        found.append(("slower", usual, last))
    elif usual > 0 and 0 < last <= usual / FACTOR:
        found.append(("faster", usual, last))
    if usual > 0 and longest >= OUTLIER * max(usual, last):
        found.append(("longest step", usual, longest))
    return found


def _usage(before: Table, end: Table) -> _Found:
    usual, values = _known(before, "kv_cache_usage"), _known(end, "kv_cache_usage")
    if not len(usual) or not len(values):
        return []
    median, last = float(np.median(usual)), float(values[-1])
    if abs(last - median) >= DIFFERENCE:
        return [("usage", median, last)]
    return [("full", median, last)] if last >= FULL else []


def _waiting(before: Table, end: Table) -> _Found:
    usual, values = _known(before, "num_waiting_reqs"), _known(end, "num_waiting_reqs")
    if not len(usual) or not len(values):
        return []
    median, last = float(np.median(usual)), int(values[-1])
    if last > max(2.0, FACTOR * median):
        return [("queue grew", median, last)]
    return [("queue shrank", median, last)] if median >= 2 and last < median / FACTOR else []


def _preemptions(before: Table, end: Table) -> _Found:
    earlier, last = total(before, "num_preempted_reqs"), total(end, "num_preempted_reqs")
    if earlier is None or last is None or last <= 0 or last / len(end) < FACTOR * earlier / len(before):
        return []
    return [("preemptions", earlier, last)]


def _computed_again(before: Table, end: Table) -> _Found:
    """As a share of the scheduled tokens."""
    usual, last = (
        float(s["num_recomputed_tokens"].sum() / max(s["num_scheduled_tokens"].sum(), 1)) for s in (before, end)
    )
    return [("computed again", usual, last)] if last >= max(SHARE, FACTOR * usual) else []


def _evictions(before: Table, end: Table) -> _Found:
    usual, last = (int(s["num_kv_blocks_evicted"].sum()) for s in (before, end))
    return [("evictions", usual, last)] if last and last / len(end) >= FACTOR * usual / len(before) else []


def _limits(before: Table, end: Table) -> _Found:
    """What limited at least half of the last batches, as a share of the steps, if it was another thing before."""
    found = []
    for why in np.unique(end["limited_by"]).tolist():
        usual, last = (float((s["limited_by"] == why).mean()) for s in (before, end))
        if why not in ("none_waiting", "unknown") and last >= 0.5 and last >= FACTOR * usual:
            found.append((f"{LIMITED_BY}{why}", usual, last))
    return found


def _no_stats(before: Table, end: Table) -> _Found:
    silent = int((end["has_scheduler_stats"] != 1).sum())
    share_before = float((before["has_scheduler_stats"] != 1).mean())
    return [("no stats", share_before, silent)] if silent and silent / len(end) > 2 * share_before else []


def _known(steps: Table, name: str) -> npt.NDArray[np.float64]:
    """The values of a state where it is known."""
    values = floats(with_stats(steps), name)
    known: npt.NDArray[np.float64] = values[np.isfinite(values)]
    return known


def _still_running(steps: Table, requests: Table) -> int | None:
    """Requests in the last batch that is known, without those that the front end had ended."""
    running = _last_known(steps, "num_running_reqs")
    if running is None:
        return None
    mine, theirs = (table[table["engine"] == with_stats(steps)["engine"][-1]] for table in (steps, requests))
    queue = queue_of(mine, theirs)
    return running if queue is None else max(0, running - queue.ended_since)


def _last_known(steps: Table, name: str) -> int | None:
    values = _known(steps, name)
    return int(values[-1]) if len(values) else None
