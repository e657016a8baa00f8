"""How a run went over time: its steps cut into equal parts, each reduced to a few numbers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Part(NamedTuple):
    """Some steps in a row. Rates are None where nothing was looked up (yet), peaks None without stats."""

    first_step: int
    last_step: int
    kv_cache_usage_peak: float | None
    num_waiting_reqs_peak: int | None
    num_preempted_reqs: int
    queries: int
    hits: int
    #: of this part alone
    hit_rate: float | None
    #: of the run up to the end of this part
    hit_rate_so_far: float | None


def progression(steps: npt.NDArray[np.void], parts: int = 10) -> list[Part]:
    """Cut steps into at most `parts` equally long parts.

    Args:
        steps: what `Trace.steps` gives, of one engine, in order.
        parts: how many; fewer come back if there are fewer steps.
    """
    out: list[Part] = []
    queries = hits = 0
    for rows in np.array_split(steps, min(parts, len(steps))) if len(steps) else []:
        known = rows[rows["has_scheduler_stats"] == 1]
        q, h = _total(rows, "prefix_cache_queries"), _total(rows, "prefix_cache_hits")
        queries, hits = queries + q, hits + h
        out.append(
            Part(
                int(rows["step"][0]),
                int(rows["step"][-1]),
                _peak(known, "kv_cache_usage"),
                None if (waiting := _peak(known, "num_waiting_reqs")) is None else int(waiting),
                _total(rows, "num_preempted_reqs"),
                q,
                h,
                h / q if q else None,
                hits / queries if queries else None,
            )
        )
    return out


def _total(rows: npt.NDArray[np.void], name: str) -> int:
    return int(rows[name].sum()) if name in (rows.dtype.names or ()) else 0


def _peak(rows: npt.NDArray[np.void], name: str) -> float | None:
    return float(rows[name].max()) if len(rows) and name in (rows.dtype.names or ()) else None
