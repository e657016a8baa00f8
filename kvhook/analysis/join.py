"""Front-end steps and the engine core's steps that caused them, joined by number.

Of each step the engine core sends at most one scheduler's stats, and the front end records each of them once: the i-th
that was sent is the i-th that came. No clock is involved, so that it holds for a core in another process as well. With
several front ends vLLM sends each to one of them, and nothing can be joined.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvhook.records.columns import Table, has


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


def labels_of(core_requests: Table, requests: Table) -> npt.NDArray[np.str_]:
    """For each request of an engine core, the label that the front end knows it by; empty for one that has none.

    They are joined by vLLM's request id and the number of the sample, so that only requests with a number for an id
    have a label here; of several engines or cores, which count from 0 each, none has.

    Args:
        core_requests: of one engine core.
        requests: of its engine.
    """
    found = np.zeros(len(core_requests), requests["label"].dtype if has(requests, "label") else "U1")
    if not has(requests, "label") or not len(requests) or not len(core_requests):
        return found
    if len(np.unique(requests["engine"])) > 1 or len(np.unique(core_requests["core"])) > 1:
        return found
    sample = requests["sample_index"] if has(requests, "sample_index") else np.zeros(len(requests), np.int64)
    keys = zip(requests["request_id"].tolist(), np.maximum(sample, 0).tolist(), strict=True)
    labels = dict(zip(keys, requests["label"].tolist(), strict=True))
    asked = zip(core_requests["request_id"].tolist(), np.maximum(core_requests["sample"], 0).tolist(), strict=True)
    for i, (name, number) in enumerate(asked):
        if name >= 0:
            found[i] = labels.get((name, number), "")
    return found
