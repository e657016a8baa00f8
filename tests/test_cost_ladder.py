"""The budget's ladder: when it steps down, how far, and when it does not."""

from __future__ import annotations

import pytest

from kvhook.adapters.step_functions import Counters
from kvhook.recording.budget import LADDER, WINDOW, WINDOWS, Level, OverheadMonitor
from tests.budgets import STEP_NS, Down


def sample(one: OverheadMonitor, share: float, count: int = WINDOW, step: int = 0) -> None:
    """Tell of steps in which kvhook took this share."""
    for _ in range(count):
        one.sample(7, step, 3, 5 * STEP_NS, 6 * STEP_NS, int(share * STEP_NS))


OVER, UNDER = 0.02, 0.005
BUDGET = 0.01


def test_far_over_the_budget_it_goes_down_rung_by_rung_until_nothing_is_left():
    down = Down()
    one = OverheadMonitor(0, max_overhead=BUDGET, step_down=down)
    sample(one, OVER, 20 * WINDOW * WINDOWS)
    assert down.asked == [Level("light"), Level("sparse", 4), Level("sparse", 16), Level("sparse", 64)]
    assert [level.name for level in LADDER] == ["full", "light", "sparse", "sparse", "sparse"]


@pytest.mark.parametrize(("start", "rest"), [("full", 4), ("light", 3)])
def test_it_begins_below_the_level_it_starts_at(start: str, rest: int):
    down = Down()
    sample(OverheadMonitor(0, level=start, max_overhead=BUDGET, step_down=down), OVER, 20 * WINDOW * WINDOWS)
    assert down.asked == list(LADDER[-rest:])


def test_it_steps_down_at_the_end_of_the_last_of_so_many_windows_and_not_before():
    down = Down()
    one = OverheadMonitor(0, max_overhead=BUDGET, step_down=down)
    sample(one, OVER, WINDOW * WINDOWS - 1)
    assert down.asked == []
    sample(one, OVER, 1)
    assert down.asked == [Level("light")]
    # and as long again before the next
    sample(one, OVER, WINDOW * WINDOWS - 1)
    assert len(down.asked) == 1
    sample(one, OVER, 1)
    assert len(down.asked) == 2


def test_windows_over_the_budget_must_be_in_a_row():
    down = Down()
    one = OverheadMonitor(0, max_overhead=BUDGET, step_down=down)
    for _ in range(10):
        sample(one, OVER, WINDOW * (WINDOWS - 1))
        sample(one, UNDER)
    assert down.asked == []


def test_a_slow_start_does_not_step_down():
    down = Down()
    one = OverheadMonitor(0, max_overhead=BUDGET, step_down=down)
    sample(one, 0.9, WINDOW * (WINDOWS - 1))
    sample(one, UNDER, 50 * WINDOW)
    assert down.asked == []


def test_one_very_dear_step_is_weighed_against_the_time_of_all_in_its_window():
    down = Down()
    one = OverheadMonitor(0, max_overhead=BUDGET, step_down=down)
    for _ in range(10):
        sample(one, 0.25, 1)
        sample(one, 0.0, WINDOW - 1)
    assert down.asked == []  # 0.25 / 32 is below one per cent


def test_exactly_the_budget_is_within_it():
    down = Down()
    one = OverheadMonitor(0, max_overhead=BUDGET, step_down=down)
    sample(one, BUDGET, 10 * WINDOW)
    assert down.asked == []
    sample(one, BUDGET + 1e-6, WINDOWS * WINDOW)
    assert down.asked == [Level("light")]


def test_without_a_budget_it_never_steps_down():
    down = Down()
    sample(OverheadMonitor(0, step_down=down), 100.0, 20 * WINDOW * WINDOWS)
    assert down.asked == []


def test_what_the_publisher_cannot_measure_counts_as_well():
    down = Down()
    sample(OverheadMonitor(int(OVER * STEP_NS), max_overhead=BUDGET, step_down=down), 0.0, WINDOW * WINDOWS)
    assert down.asked == [Level("light")]
    assert down.shares == [pytest.approx(OVER)]


def test_it_says_where_the_publisher_was_and_the_share_of_the_last_window():
    down = Down()
    one = OverheadMonitor(0, max_overhead=BUDGET, step_down=down)
    sample(one, 0.5, WINDOW * (WINDOWS - 1), step=100)
    sample(one, 0.04, WINDOW, step=200)
    assert down.counters == [Counters(7, 200, 3)]
    assert down.shares == [pytest.approx(0.04)]


def test_where_it_cannot_step_down_it_is_not_asked_again():
    down = Down(lambda level: level.name == "light")
    one = OverheadMonitor(0, max_overhead=BUDGET, step_down=down)
    sample(one, OVER, 20 * WINDOW * WINDOWS)
    assert down.asked == [Level("light"), Level("sparse", 4)]


def test_records_without_times_say_nothing_of_a_share():
    """As those of an engine whose own step nobody sees."""
    down = Down()
    one = OverheadMonitor(0, max_overhead=BUDGET, step_down=down)
    for _ in range(WINDOW * WINDOWS):
        one.sample(0, 0, 0, 5, 5, 1)
    assert down.asked == []
