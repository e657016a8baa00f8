"""Peaks inside steps out of the engine core's record: joined by number, or absent with a reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from kvhook.analysis.peaks import NotJoined, peaks_of

FRONT = [(n, "<i8") for n in ("engine", "engine_index", "has_scheduler_stats", "num_kv_blocks_used", "t_end_ns")]
CORE = [(n, "<i8") for n in ("step", "stats_number", "t_schedule_ns", "num_kv_blocks_peak", "num_kv_blocks_used")]
ENGINES = [
    {"engine": 0, "num_kv_blocks": 10},
    {"engine": 1, "num_kv_blocks": 20, "kv_usage_of": 25, "kv_usage_reserved": 1},
]


class Cores:
    """The tables of some engine cores."""

    def __init__(
        self,
        *tables: Sequence[tuple[int, ...]],
        ranks: tuple[int, ...] = (),
        lost: int = 0,
        fronts: int = 1,
        clients: tuple[int, ...] = (0, 0),
    ) -> None:
        self.tables = [np.array(list(table), CORE) for table in tables]
        self.facts: list[dict[str, Any]] = [{"data_parallel_rank": rank} for rank in ranks] or [{} for _ in tables]
        self.facts = [facts | {"num_front_ends": fronts} for facts in self.facts]
        self.clients = clients
        self.lost, self.why_none = lost, "nothing was recorded"

    def __len__(self) -> int:
        return len(self.tables)

    def steps(self, core: int) -> Any:
        return self.tables[core]

    def requests(self, core: int) -> Any:
        return np.array([(client,) for client in self.clients], [("client_index", "<i8")])


def front(*rows: tuple[int, ...]) -> Any:
    return np.array(list(rows), FRONT)


def peaks(steps: Any, cores: Any, lost: int = 0) -> Any:
    return peaks_of(steps, cores, ENGINES, lost)


#: step, stats_number, t_schedule_ns, num_kv_blocks_peak, num_kv_blocks_used
ONE = [(0, 0, 100, 4, 3), (1, -1, 110, 5, 5), (2, 1, 120, 7, 6)]
TWO = [(0, 0, 105, 9, 9), (1, 1, 115, 2, 1)]


def test_each_step_that_brought_stats_has_the_peak_of_the_step_that_made_them():
    found = peaks(front((0, 0, 1, 3, 105), (0, 0, 0, -1, 115), (0, 0, 1, 6, 125)), Cores(ONE))
    assert found.num_kv_blocks_peak.tolist() == [4, -1, 7]
    np.testing.assert_array_equal(found.kv_cache_usage_peak, [0.4, np.nan, 0.7])


def test_engines_that_were_made_one_after_the_other_belong_to_cores_in_that_order():
    steps = front((1, 0, 1, 9, 109), (0, 0, 1, 3, 104), (1, 0, 1, 1, 119))
    for cores in (Cores(ONE, TWO), Cores(TWO, ONE)):
        found = peaks(steps, cores)
        assert found.num_kv_blocks_peak.tolist() == [9, 4, 2]
        assert found.kv_cache_usage_peak.tolist() == pytest.approx([10 / 25, 0.4, 3 / 25])


def test_data_parallel_ranks_of_one_front_end_are_told_apart_by_their_number():
    steps = front((0, 1, 1, 3, 105), (0, 0, 1, 9, 106), (0, 0, 1, 1, 119))
    assert peaks(steps, Cores(ONE, TWO, ranks=(1, 0))).num_kv_blocks_peak.tolist() == [4, 9, 2]


def test_what_cannot_be_joined_for_sure_is_not_and_the_reason_is_told():
    steps = front((0, 0, 1, 3, 105), (0, 0, 1, 6, 125))
    for cores, lost, why in (
        (Cores(), 0, "nothing was recorded"),
        (Cores(ONE), 1, "records are missing"),
        (Cores(ONE, lost=2), 0, "records are missing"),
        (Cores(ONE, TWO), 0, "2 engine cores and 1 front ends"),
        (Cores(TWO), 0, "do not agree"),
        (Cores(ONE, fronts=2), 0, "several front ends"),
        (Cores(ONE, clients=(0, 1)), 0, "several front ends"),
    ):
        with pytest.raises(NotJoined, match=why):
            peaks(steps, cores, lost)
