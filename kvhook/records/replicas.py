"""Ranks that do the same work.

With an external launcher (torchrun) each rank of a tensor- or pipeline-parallel group has a scheduler of its own, which
decides what those of the others decide. Together they are one engine.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from kvhook.records.whose import asked_for

_LAUNCHED = "external_launcher"


def replicas(engines: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    """Engine of a run -> the engine whose work it did too; those that stand for themselves are left out.

    Args:
        engines: facts about the engines of a run, in the order of their numbers.
    """
    first: dict[Any, int] = {}
    seen: dict[Any, int] = {}
    found = {}
    for facts in engines:
        rank = facts.get("rank")
        size = _count(facts, "tensor_parallel_size") * _count(facts, "pipeline_parallel_size")
        if facts.get("executor") != _LAUNCHED or size < 2 or type(rank) is not int:
            continue
        folder, name = os.path.split(str(facts.get("trace") or ""))
        job = folder, asked_for(name)
        place = seen[job, rank] = seen.get((job, rank), -1) + 1  # a rank may have several engines
        number = int(facts["engine"])
        same = first.setdefault((job, rank // size, place), number)
        if same != number:
            found[number] = same
    return found


def _count(facts: Mapping[str, Any], name: str) -> int:
    count = facts.get(name)
    return count if type(count) is int and count > 0 else 1


def counted(engines: Sequence[Mapping[str, Any]]) -> list[int]:
    """The engines that count in the sums over a run: of replicas one."""
    twice = replicas(engines)
    return [number for facts in engines if (number := int(facts["engine"])) not in twice]
