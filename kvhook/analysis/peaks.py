"""Peaks inside steps of an engine whose scheduler is in another process: taken from the engine core's own record.

Front end and core are joined by number, see `kvhook.analysis.join`. Where that might go wrong, the peaks stay absent,
and the reason is told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvhook.analysis.join import core_step_of
from kvhook.records.claims import claimed_by
from kvhook.records.columns import Table, has
from kvhook.records.core import CoreRecords

#: The columns that are filled.
PEAKS = ("num_kv_blocks_peak", "kv_cache_usage_peak")
#: Columns that are needed for it.
NEEDED = ("engine", "engine_index", "has_scheduler_stats", "num_kv_blocks_used", "t_end_ns")

_LOST = "records are missing, so that steps of the front end and of the engine core cannot be counted one by one"
_SEVERAL = (
    "there are {cores} engine cores and {fronts} front ends in this run, and which step belongs to which is not known: "
    "core_steps() has the peaks"
)
_FRONTS = (
    "several front ends share this engine core, and vLLM sends the stats of each step to one of them: core_steps() has "
    "the peaks"
)
_DIFFER = "the blocks in use that front end and engine core tell do not agree, so that their steps cannot be joined"


class Peaks(NamedTuple):
    """For each step of the front end; -1 and NaN for one that brought no stats."""

    num_kv_blocks_peak: npt.NDArray[np.int64]
    kv_cache_usage_peak: npt.NDArray[np.float64]


class NotJoined(Exception):
    """Why the engine core's steps are not used."""


def peaks_of(steps: Table, cores: CoreRecords, engines: Sequence[Mapping[str, Any]], lost: int) -> Peaks:
    """The peaks inside steps. An engine whose core cannot be told has none, if that of another one can.

    Args:
        steps: of all engines of a run, from its beginning, with the columns `NEEDED`.
        cores: its engine cores.
        engines: facts about its engines.
        lost: how many records of the run are missing.

    Raises:
        NotJoined: of no engine can it be said for sure which step of a core belongs to which of its steps.
    """
    ofs = {int(e["engine"]): e for e in engines}
    blocks, usage = np.full(len(steps), -1), np.full(len(steps), np.nan)
    for (engine, _), (_, mine, rows) in _joined(steps, cores, lost).items():
        blocks[mine] = rows["num_kv_blocks_peak"]
        facts = ofs.get(engine, {})
        of = facts.get("kv_usage_of") or facts.get("num_kv_blocks")
        if of:
            usage[mine] = (blocks[mine] + (facts.get("kv_usage_reserved") or 0)) / of
    return Peaks(blocks, usage)


def cores_of_engine(engine: int, steps: Table, cores: CoreRecords, lost: int) -> CoreRecords:
    """The cores of one engine of a run; none, with the reason, where it cannot be said for sure which they are.

    Args:
        engine: its number.
        steps: of all engines of the run, as `peaks_of` wants them.
        cores: those of all of them.
        lost: how many records of the run are missing.
    """
    mine = cores.of_engines([engine])
    if not len(mine) or all(claimed_by(facts) == frozenset([engine]) for facts in mine.facts):
        return mine
    try:
        joined = _joined(steps, cores, lost)
    except NotJoined as why:
        return cores.only([], str(why))
    wanted = sorted({core for (of, _), (core, _, _) in joined.items() if of == engine})
    return cores.only(wanted, _SEVERAL.format(cores=len(mine), fronts=len(np.unique(steps["engine"]))))


#: (engine, rank) -> its core, its places in the table of steps that brought stats, and the core's steps that made them
_Joined = dict[tuple[int, int], tuple[int, npt.NDArray[np.intp], Table]]


def _joined(steps: Table, cores: CoreRecords, lost: int) -> _Joined:
    if not len(cores):
        raise NotJoined(cores.why_none)
    if lost or cores.lost:
        raise NotJoined(_LOST)
    found: _Joined = {}
    reasons: list[str] = []
    for engines, some in _groups(np.unique(steps["engine"]).tolist(), cores):
        try:
            found |= _joined_of(steps, cores, engines, some)
        except NotJoined as why:
            reasons.append(str(why))
    if reasons and not found:
        raise NotJoined("; ".join(dict.fromkeys(reasons)))
    return found


def _groups(engines: Sequence[int], cores: CoreRecords) -> list[tuple[set[int], list[int]]]:
    """Engines and cores that may belong to each other: those of one process."""
    groups: list[tuple[set[int], list[int]]] = []
    for core, facts in enumerate(cores.facts):
        claimed = claimed_by(facts)
        of, some = set(engines if claimed is None else claimed), [core]
        for group in [g for g in groups if g[0] & of]:
            groups.remove(group)
            of, some = of | group[0], group[1] + some
        groups.append((of, some))
    return groups


def _joined_of(steps: Table, cores: CoreRecords, engines: set[int], some: Sequence[int]) -> _Joined:
    """The same of some engines and cores, which belong to each other."""
    if any(_has_several_front_ends(cores, core) for core in some):
        raise NotJoined(_FRONTS)
    found: _Joined = {}
    for (engine, rank), core in _pairs(steps[np.isin(steps["engine"], list(engines))], cores, some).items():
        mine = np.flatnonzero((steps["engine"] == engine) & (steps["engine_index"] == rank))
        theirs = cores.steps(core)
        joined = core_step_of(steps[mine], theirs)
        there = joined >= 0
        if not len(theirs) or not there.any():
            continue
        rows = theirs[np.searchsorted(theirs["step"], joined[there])]
        _agree(steps[mine[there]], rows)
        found[engine, rank] = core, mine[there], rows
    return found


def _has_several_front_ends(cores: CoreRecords, core: int) -> bool:
    if (cores.facts[core].get("num_front_ends") or 1) > 1:
        return True
    requests = cores.requests(core)  # older releases do not tell how many there are
    return has(requests, "client_index") and bool((requests["client_index"] > 0).any())


def _pairs(steps: Table, cores: CoreRecords, some: Sequence[int]) -> dict[tuple[int, int], int]:
    """(engine, rank) -> number of its core."""
    first: dict[tuple[int, int], int] = {}
    for engine in np.unique(steps["engine"]).tolist():
        of_engine = steps[steps["engine"] == engine]
        for rank in np.unique(of_engine["engine_index"]).tolist():
            first[engine, rank] = int(of_engine["t_end_ns"][of_engine["engine_index"] == rank].min())
    if len({rank for _, rank in first}) == len(first) > 1:  # the ranks of one front end
        ranks = {cores.facts[core].get("data_parallel_rank"): core for core in some}
        if set(ranks) >= {rank for _, rank in first} and len(ranks) == len(some):
            return {(engine, rank): ranks[rank] for engine, rank in first}
    begun = {core: int(table["t_schedule_ns"][0]) for core in some if len(table := cores.steps(core))}
    if len(begun) != len(first) or len(first) != len({engine for engine, _ in first}):
        raise NotJoined(_SEVERAL.format(cores=len(some), fronts=len(first)))
    return dict(zip(sorted(first, key=first.__getitem__), sorted(begun, key=begun.__getitem__), strict=True))


def _agree(steps: Table, rows: Table) -> None:
    if has(steps, "num_kv_blocks_used"):
        known = (steps["num_kv_blocks_used"] >= 0) & (rows["num_kv_blocks_used"] >= 0)
        if (steps["num_kv_blocks_used"] != rows["num_kv_blocks_used"])[known].any():
            raise NotJoined(_DIFFER)
