"""The engines of a run: which of them worked at the same time, and what each had.

An engine that is made again for each setting is several engines. Their blocks and queues may be added up only where
they worked at the same time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvhook.analysis.part import Part
    from kvhook.analysis.totals import Totals


@dataclasses.dataclass(frozen=True)
class EngineLife:
    """One engine of a run.

    ``began`` and ``ended`` are the start of its first step and the end of its last, in seconds of the monotonic clock.
    """

    engine: int
    steps: int
    began: float
    ended: float
    num_kv_blocks: int | None
    kv_cache_usage_peak: float | None
    num_running_reqs_peak: int | None
    num_waiting_reqs_peak: int | None
    #: whether another engine of the run worked at the same time
    overlaps: bool


def lives(totals: Totals, part: Part) -> list[EngineLife]:
    """The engines that made steps, in the order in which they began.

    Args:
        totals: of the run.
        part: the engines.
    """
    found = []
    for facts in part.engines:
        steps = totals.of([facts["engine"]]).steps
        if not steps.steps:
            continue
        running, waiting = (
            peak if part.has(name) and (peak := steps.known_peaks.get(name, -1)) >= 0 else None
            for name in ("num_running_reqs", "num_waiting_reqs")
        )
        began, ended = steps.span
        usage = steps.usage.largest if part.has("kv_cache_usage") else -1
        found.append(
            EngineLife(
                engine=facts["engine"],
                steps=steps.steps,
                began=began / 1e9,
                ended=ended / 1e9,
                num_kv_blocks=facts.get("num_kv_blocks") or None,
                kv_cache_usage_peak=usage if usage >= 0 else None,
                num_running_reqs_peak=running,
                num_waiting_reqs_peak=waiting,
                overlaps=False,
            )
        )
    found.sort(key=lambda life: (life.began, life.engine))
    return [dataclasses.replace(life, overlaps=_overlaps(life, found)) for life in found]


def most_blocks(found: Sequence[EngineLife]) -> int | None:
    """The most KV blocks that there were at one time; None if no engine says its number."""
    at_each_begin = [
        sum(other.num_kv_blocks or 0 for other in found if other.began <= life.began < other.ended or other is life)
        for life in found
    ]
    return max(at_each_begin, default=0) or None


def _overlaps(life: EngineLife, all_of_them: Iterable[EngineLife]) -> bool:
    return any(o.engine != life.engine and o.began < life.ended and life.began < o.ended for o in all_of_them)
