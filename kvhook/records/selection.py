"""Which steps of a run are meant: those of a scope, of a label, between two moments, or by their numbers."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from kvhook.errors import KvhookError
from kvhook.records.columns import Table, has
from kvhook.records.events import Events, Scope
from kvhook.records.part import FOREVER, Bools, Interval, Ints, inside
from kvhook.records.tables import Records, longest
from kvhook.schema import NAMES

#: What is needed of each step to choose some.
STEP_KEYS = ("engine", "step", "t_end_ns")
_REQUEST_KEYS = ("engine", "request", "step", "label")
#: So many names are told in an error.
_MOST_NAMES = 8


def keys_of(records: Records) -> Table:
    """Of each step its engine, its number and its end."""
    return records.steps(columns=STEP_KEYS)


def interval_of(scope: Scope) -> Interval:
    """From when to when a scope went on; for ever if it never ended."""
    return scope.began_ns, scope.ended_ns if scope.ended_ns >= 0 else FOREVER


def warmups(scopes: Sequence[Scope]) -> list[Scope]:
    """The outermost scopes that are marked as warm-up."""
    inside = {s.number for s in scopes if s.warmup}
    return [s for s in scopes if s.warmup and s.parent not in inside]


def find_scopes(scopes: Sequence[Scope], wanted: str | int | Scope) -> list[Scope]:
    """The scopes that are meant: all with that name, path or kind of call; or the one with that number.

    Raises:
        KvhookError: there is none; the message names those that there are.
    """
    if isinstance(wanted, Scope):
        wanted = wanted.number
    if isinstance(wanted, int):
        found = [s for s in scopes if s.number == wanted]
    else:
        found = [s for s in scopes if wanted in (s.name, s.path) or (s.kind == wanted and s.kind != "scope")]
    if not found:
        names = [s.path if s.path != s.name else s.name for s in scopes]
        raise KvhookError(f"there is no scope {wanted!r} in this run; {_there_are(str(wanted), names, 'scopes')}")
    return found


def _there_are(wanted: str, names: Iterable[str], what: str) -> str:
    known = list(dict.fromkeys(names))
    if not known:
        return f"it has no {what}"
    near = difflib.get_close_matches(wanted, known, _MOST_NAMES) or known[:_MOST_NAMES]
    more = f" and {len(known) - len(near)} more" if len(known) > len(near) else ""
    return f"there are {', '.join(map(repr, near))}{more}"


def steps_in(keys: Table, scopes: Iterable[Scope]) -> Bools:
    """Which steps ended inside of some scopes."""
    by_engines: dict[tuple[int, ...], list[Interval]] = {}
    for scope in scopes:
        by_engines.setdefault(scope.engines, []).append(interval_of(scope))
    out = np.zeros(len(keys), np.bool_)
    for engines, intervals in by_engines.items():
        mine = inside(keys["t_end_ns"], intervals)
        if engines:
            mine &= np.isin(keys["engine"], engines)
        out |= mine
    return out


def labelled(records: Records, label: str) -> tuple[dict[int, Ints], Table]:
    """The requests with a label: engine -> their numbers, and their rows.

    Raises:
        KvhookError: no request has it, or labels are not recorded in this run.
    """
    there = {c.name for c in records.columns("request")}
    if "label" not in there:
        why = records.engines.absent("request").get("label", "it was recorded before there were labels")
        raise KvhookError(f"this run tells no labels of requests: {why}")
    more = [name for name in ("e2e_latency", "t_end_ns") if name in there]
    rows = records.requests(columns=[*_REQUEST_KEYS, *more])
    found = rows[rows["label"] == label]
    if not len(found):
        names = np.unique(rows["label"]).tolist()
        raise KvhookError(
            f"no request of this run is labelled {label!r}; {_there_are(label, filter(None, names), 'labels')}"
        )
    engines = np.unique(found["engine"]).tolist()
    return {e: found["request"][found["engine"] == e] for e in engines}, found


def steps_of_requests(keys: Table, requests: Table) -> Bools:
    """Which steps ended while one of these requests was in the engine, from its arrival to the step it finished in."""
    out = np.zeros(len(keys), np.bool_)
    for engine in np.unique(requests["engine"]).tolist():
        at = (keys["engine"] == engine).nonzero()[0]
        mine = requests[requests["engine"] == engine]
        at = at[np.argsort(keys["step"][at], kind="stable")]
        numbers, ends = keys["step"][at], np.maximum.accumulate(keys["t_end_ns"][at])
        last = np.searchsorted(numbers, mine["step"])
        known = (last < len(at)) & (numbers[np.minimum(last, len(at) - 1)] == mine["step"]) if len(at) else last < 0
        last, mine = last[known], mine[known]
        first = np.minimum(_first_steps(ends, last, mine), last)
        change = np.zeros(len(at) + 1, np.int64)
        np.add.at(change, first, 1)
        np.add.at(change, last + 1, -1)
        out[at[np.cumsum(change[:-1]) > 0]] = True
    return out


def _first_steps(ends: Ints, last: Ints, requests: Table) -> Ints:
    """The place of the first step that ended after each request had come."""
    if not has(requests, "e2e_latency"):
        return last
    took: npt.NDArray[np.float64] = requests["e2e_latency"] * 1e9
    arrived = ends[last] - np.where(took >= 0, took, 0).astype(np.int64)
    first: Ints = np.searchsorted(ends, arrived, side="right")
    return first


def by_number(keys: Table, which: slice | int) -> Bools:
    """The steps of each engine whose numbers are in a slice; negative numbers count from an engine's last step.

    Raises:
        KvhookError: it is neither a number nor a slice of them, or has a stride.
    """
    if isinstance(which, (int, np.integer)):
        which = slice(int(which), int(which) + 1 if which != -1 else None)
    cut: object = which
    if not isinstance(cut, slice) or cut.step not in (None, 1):
        raise KvhookError(f"a trace is cut by numbers of steps, such as trace[100:200], not by {cut!r}")
    out = np.zeros(len(keys), np.bool_)
    for engine in np.unique(keys["engine"]).tolist():
        mine = keys["engine"] == engine
        numbers = keys["step"][mine]
        begin, end, _ = slice(cut.start, cut.stop).indices(int(numbers.max()) + 1)
        out[mine] = (numbers >= begin) & (numbers < end)
    return out


def places_of(steps: Table, some: Table) -> Ints:
    """Where some of a run's steps are among all of them.

    Args:
        steps: all of them: their ``engine`` and ``step``.
        some: the same of those that are looked for.
    """
    keys, wanted = (table["engine"] << 40 | table["step"] for table in (steps, some))
    order = np.argsort(keys, kind="stable")
    found: Ints = order[np.searchsorted(keys, wanted, sorter=order)]
    return found


def labels_of_core_requests(core_requests: Table, events: Events) -> Table:
    """The label and the LoRA adapter of each request of an engine core: columns ``label`` and ``lora_name``.

    They are empty where it has none. Front end and core know a request by the same key. Where an id was used several
    times, the one that was added last before the core's request ended is meant.

    Args:
        core_requests: as `kvhook.records.core.CoreRecords.requests` gives them.
        events: of the run.
    """
    out = np.zeros(len(core_requests), [(name, f"U{longest(events.names[name])}") for name in NAMES])
    added = sorted(events.requests, key=lambda one: (one.request_key, one.t_ns))
    keys, times = (np.array([getattr(one, name) for one in added], np.int64) for name in ("request_key", "t_ns"))
    asked, ended = core_requests["request_key"], core_requests["t_finished_ns"]
    first, last = (np.searchsorted(keys, asked, side=side) for side in ("left", "right"))
    for row in np.flatnonzero(first < last).tolist():
        begin, end = int(first[row]), int(last[row])
        at = begin + int(np.searchsorted(times[begin:end], ended[row], side="right")) - 1
        one = added[max(at, begin)]
        out[row] = tuple(events.names[name].get(getattr(one, name), "") for name in NAMES)
    return out
