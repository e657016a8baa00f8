"""The engines of a run: which of them worked at the same time, and what each had.

An engine that is made again for each setting is several engines. Their blocks and queues may be added up only where
they worked at the same time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from kvhook.records.columns import Table, floats, has_times, with_stats


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


def lives(steps: Table, engines: Iterable[dict[str, Any]]) -> list[EngineLife]:
    """The engines that made steps, in the order in which they began.

    Args:
        steps: of all of them.
        engines: their facts.
    """
    found = []
    for facts in engines:
        mine = steps[steps["engine"] == facts["engine"]]
        if not len(mine):
            continue
        known = with_stats(mine)
        running, waiting = _peak(known, "num_running_reqs"), _peak(known, "num_waiting_reqs")
        began, ended = span(mine)
        found.append(
            EngineLife(
                engine=facts["engine"],
                steps=len(mine),
                began=began / 1e9,
                ended=ended / 1e9,
                num_kv_blocks=facts.get("num_kv_blocks") or None,
                kv_cache_usage_peak=_peak(known, "kv_cache_usage"),
                num_running_reqs_peak=None if running is None else int(running),
                num_waiting_reqs_peak=None if waiting is None else int(waiting),
                overlaps=False,
            )
        )
    found.sort(key=lambda life: (life.began, life.engine))
    return [dataclasses.replace(life, overlaps=_overlaps(life, found)) for life in found]


def span(steps: Table) -> tuple[int, int]:
    """When the first of these steps began and the last one ended, in nanoseconds; there must be some.

    A record without times may have been written long after the last step, for a request that was aborted.
    """
    timed = steps[has_times(steps)]
    timed = timed if len(timed) else steps
    return int(timed["t_start_ns"].min()), int(timed["t_end_ns"].max())


def most_blocks(found: Sequence[EngineLife]) -> int | None:
    """The most KV blocks that there were at one time; None if no engine says its number."""
    at_each_begin = [
        sum(other.num_kv_blocks or 0 for other in found if other.began <= life.began < other.ended or other is life)
        for life in found
    ]
    return max(at_each_begin, default=0) or None


def _overlaps(life: EngineLife, all_of_them: Iterable[EngineLife]) -> bool:
    return any(o.engine != life.engine and o.began < life.ended and life.began < o.ended for o in all_of_them)


def _peak(known: Table, name: str) -> float | None:
    values = floats(known, name)
    values = values[values >= 0]
    return float(values.max()) if len(values) else None
