"""Front-end steps and the engine core's steps that caused them, joined by number.

Of each step the engine core sends at most one scheduler's stats, and the front end records each of them once: the i-th
that was sent is the i-th that came. No clock is involved, so that it holds for a core in another process as well. With
several front ends vLLM sends each to one of them, and nothing can be joined.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvhook.records.columns import Table


def core_step_of(steps: Table, core_steps: Table) -> npt.NDArray[np.int64]:
    """For each step of one engine, the step of its core whose stats it brought; -1 where it brought none.

    Args:
        steps: of one engine (and rank), recorded from its start.
        core_steps: of its engine core.
    """
    with_stats = steps["has_scheduler_stats"] == 1
    number = np.where(with_stats, np.cumsum(with_stats) - 1, -1)
    sent = core_steps[core_steps["stats_number"] >= 0]
    found = np.full(len(steps), -1, np.int64)
    place = np.searchsorted(sent["stats_number"], number)
    inside = with_stats & (place < len(sent))
    inside[inside] = sent["stats_number"][place[inside]] == number[inside]
    found[inside] = sent["step"][place[inside]]
    return found
