"""What an autopsy says of the engine core's last steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvhook.analysis.autopsy import core_changes
from kvhook.text.autopsy import sentences

TYPES = [
    ("num_scheduled_tokens", "<i8"),
    ("num_recomputed_tokens", "<i8"),
    ("num_kv_blocks_evicted", "<i8"),
    ("limited_by", "U20"),
]


def steps(*parts: tuple[int, tuple[int, int, int, str]]) -> Any:
    """So many steps of each kind, one after the other."""
    return np.array([row for count, row in parts for _ in range(count)], TYPES)


CALM = (100, 0, 0, "none_waiting")


def test_a_run_that_ends_as_it_went_on_has_no_changes():
    assert core_changes(steps((100, CALM))) == []
    assert core_changes(steps((100, (50, 10, 2, "kv_blocks")))) == []
    assert core_changes(steps((3, CALM))) == []


def test_work_done_twice_evictions_and_what_limited_the_last_steps_are_told():
    found = core_changes(steps((84, CALM), (4, CALM), (12, (100, 25, 3, "kv_blocks"))))
    assert [(c.what, c.before, c.last) for c in found] == [
        ("computed again", 0.0, pytest.approx(12 * 25 / 1600)),
        ("evictions", 0, 36),
        ("limited by kv_blocks", 0.0, 0.75),
    ]
    assert sentences(found) == [
        "18.8 % of the tokens that the engine core scheduled in the last 16 steps had been computed before, "
        "0.0 % until then",
        "36 cached blocks evicted in the last 16 steps of the engine core, 0 in the 84 before",
        "in 75.0 % of the last 16 steps of the engine core batches did not grow: no KV blocks (0.0 % before)",
    ]
