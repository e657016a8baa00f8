"""Whose an engine core is: which of the traces beside its files belong to a front end of it.

All processes that were given ``trace="run.kvh"`` write the files of their engine cores under that name,
``run.core...``, and have traces of their own: ``run.kvh``, ``run-rank1.kvh``, ``run-pid4711.kvh``. Several API servers
have one core together. So names alone do not tell which core a trace belongs to; what core and front end say of their
processes does.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kvhook.records.claims import claim, claimed_by
from kvhook.records.core import CoreRecords
from kvhook.records.core_files import core_files, open_cores
from kvhook.ring.trace_file import TRACE_SUFFIX

Facts = Mapping[str, Any]

#: What kvhook puts behind the name that was asked for, see `kvhook.recording.own_files`.
_OWN = re.compile(r"(?:-rank\d{1,9})?(?:-pid\d{1,10})?(?:-\d{1,9}){0,2}$")
_OF_OTHERS = "the files of engine cores beside {} are those of other processes"


class Front(NamedTuple):
    """The trace of a front end: its file, and which engines of the run are in it. None: all that there are."""

    path: Path
    engines: Sequence[int] | None = None


def cores_of(fronts: Sequence[Front], engines: Sequence[Facts], name: str) -> CoreRecords:
    """The engine cores of some traces, each core once. Their facts say of which engines they may be.

    Args:
        fronts: the traces.
        engines: facts about the engines of all of them.
        name: what to call all in errors.
    """
    if len(fronts) == 1 and fronts[0].engines is None:
        return _beside(fronts[0].path, engines, name)
    known = {int(facts["engine"]): facts for facts in engines}
    found = []
    for front in fronts:
        numbers = list(known) if front.engines is None else list(front.engines)
        mine = _beside(front.path, [known[n] for n in numbers if n in known], str(front.path))
        for facts in mine.facts:
            claim(facts, numbers)
        found.append(mine)
    return CoreRecords.together(found, name)


def may_be_beside(trace: Path, engines: Iterable[Facts] = ()) -> list[Path]:
    """The files of engine cores that may belong to a trace, by their names: its own, and those of the name that was
    asked for.

    Args:
        trace: the file of a front end.
        engines: facts about its engines, where they are known.
    """
    if trace.suffix != TRACE_SUFFIX:
        return []
    stem = trace.name.removesuffix(TRACE_SUFFIX)
    stems = {stem, asked_for(trace.name)}
    for facts in engines:
        # in a folder a process has a file with its number, and the one that started it too
        pid, parent = facts.get("pid"), facts.get("parent_pid")
        if type(pid) is type(parent) is int and stem.endswith(f"-{pid}"):
            stems.add(f"{stem.removesuffix(f'-{pid}')}-{parent}")
    return [path for one in sorted(stems) for path in core_files(trace.with_name(one + TRACE_SUFFIX))]


def asked_for(name: str) -> str:
    """The name that a trace was asked for, without its suffix: ``run`` of ``run-rank1-pid4711.kvh``. It may be too
    little of a name that ends so by itself."""
    stem = name.removesuffix(TRACE_SUFFIX)
    return _OWN.sub("", stem) or stem


def _beside(trace: Path, engines: Sequence[Facts], name: str) -> CoreRecords:
    """The cores of one trace."""
    found = open_cores(may_be_beside(trace, engines), name)
    own = {origin for origin in found.origins if _stem_of(origin) == os.path.realpath(trace).removesuffix(TRACE_SUFFIX)}
    mine = [
        core
        for core, facts in enumerate(found.facts)
        if any(belongs(facts, front, named=found.origins[core] in own) for front in engines or ({},))
    ]
    return found if len(mine) == len(found) else found.only(mine, _OF_OTHERS.format(trace))


def _stem_of(origin: Any) -> str:
    return str(origin[0])


def belongs(core: Facts, front: Facts, *, named: bool) -> bool:
    """Whether an engine core belongs to a front end.

    Args:
        core: facts about it.
        front: the same of an engine of the front end; older recordings tell less.
        named: whether the names of their files say so. Then it does, unless what is known of their processes speaks
            against it; otherwise that has to speak for it.
    """
    mine, parent = front.get("pid"), core.get("parent")
    if mine is None or parent is None:
        return named
    if _is_shared(core) and front.get("parent_pid") == parent:
        return True
    own = core.get("own_process")
    if own is False and core.get("pid") != parent:
        return bool(mine == core.get("pid"))  # made by a forked child, which carries out its parent's plan
    # older recordings do not say whether the core is in a process of its own
    if mine not in ((parent,) if own else (parent, core.get("pid"))):
        return False
    sessions = core.get("session"), front.get("session")
    return named if None in sessions else sessions[0] == sessions[1]


def _is_shared(core: Facts) -> bool:
    """Whether several front ends have it: API servers, which the process that made the core has started too."""
    count = core.get("num_front_ends")
    return type(count) is int and count > 1


def shifted(cores: CoreRecords, engines: Sequence[int]) -> CoreRecords:
    """The same cores, of a run whose engines have these numbers now."""
    moved = cores.only(range(len(cores)))
    moved.facts = [dict(facts) for facts in moved.facts]
    for facts in moved.facts:
        theirs = claimed_by(facts)
        claim(facts, engines if theirs is None else [engines[n] for n in theirs if 0 <= n < len(engines)])
    return moved
