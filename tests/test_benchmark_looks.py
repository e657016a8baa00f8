"""The arithmetic of `benchmarks/collectors.py`: what a way has shown, held against a run that is known."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

from tests.conftest import ROOT

MS = 1_000_000


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("collecting.looks")


@pytest.fixture
def run(looks: Any) -> Any:
    """Ten steps, 10 ms apart; usage 0.1, 0.2, ... 1.0; two tokens each, but the third gives none."""
    tokens = np.cumsum([2, 2, 0, 2, 2, 2, 2, 2, 2, 2])
    rows = [(i * 10 * MS, (i + 1) / 10, 1.0, int(tokens[i]), 100 * (i + 1), 40 * (i + 1)) for i in range(10)]
    return looks.the_run(rows)


def records(looks: Any, run: Any, late: float = 0.0) -> list[Any]:
    columns = zip(run.t + late, run.usage, run.tokens, run.queries, run.hits, strict=True)
    return [looks.Look(*map(float, one)) for one in columns]


def test_totals_begin_with_the_run(looks: Any):
    run = looks.the_run([(1, 0.5, 0.5, 12, 30, 10)], (0, 0.0, 0.0, 10, 20, 5))
    assert (run.tokens[0], run.queries[0], run.hits[0]) == (2, 10, 5)


def test_a_record_of_each_step_sees_all_of_them(looks: Any, run: Any):
    found = looks.against(run, records(looks, run, late=3 * MS), records=True)
    assert (found["steps_seen"], found["share_of_steps"], found["usage_of_another_step"]) == (10, 1.0, 0)
    assert (found["peak_found"], found["hit_rate_found"]) == (1.0, 0.4)
    assert found["delay_ms"] == {"p50": 3.0, "p99": 3.0, "max": 3.0, "never_shown": 0.0}


def test_a_missing_record_is_missed_and_a_wrong_usage_is_noticed(looks: Any, run: Any):
    some = records(looks, run)
    del some[4]
    some[5] = some[5]._replace(usage=0.33)
    found = looks.against(run, some, records=True)
    assert (found["steps_seen"], found["usage_of_another_step"]) == (9, 1)


def test_a_poller_sees_one_step_a_look_and_none_twice(looks: Any, run: Any):
    all_of_them = records(looks, run)
    # after the second step, again before the third, after the sixth, and once when the run is over
    polls = [
        all_of_them[1]._replace(t=12.0 * MS),
        all_of_them[1]._replace(t=14.0 * MS),
        all_of_them[5]._replace(t=58.0 * MS),
        all_of_them[9]._replace(t=100.0 * MS),
    ]
    found = looks.against(run, polls)
    assert (found["looks"], found["steps_seen"]) == (3, 2)
    assert (found["peak_found"], found["hit_rate_found"]) == (0.6, 0.4)
    # the first step is shown 12 ms after its end, the second 2; the last look shows the seventh after 40 ms
    assert found["delay_ms"]["max"] == 40
    assert found["delay_ms"]["never_shown"] == 0


def test_what_no_look_shows_is_never_shown(looks: Any, run: Any):
    line = looks.Look(35.0 * MS, 0.4, np.nan, rate=0.25)
    found = looks.against(run, [line])
    assert (found["steps_seen"], found["peak_found"], found["hit_rate_found"]) == (1, 0.4, 0.25)
    assert found["delay_ms"]["never_shown"] == pytest.approx(6 / 9)
    assert found["delay_ms"]["p50"] is found["delay_ms"]["max"] is None


def test_a_way_that_shows_nothing_found_nothing(looks: Any, run: Any):
    found = looks.against(run, [])
    assert (found["steps_seen"], found["peak_found"], found["hit_rate_found"]) == (0, None, None)
    assert found["delay_ms"]["never_shown"] == 1


def test_the_peak_at_any_phase_is_that_of_looks_at_every_moment(looks: Any, run: Any):
    # looks 45 ms apart: the last one before the end of the run is 0 to 45 ms before it
    found = looks.peak_at_any_phase(run, 0.045)
    assert found["least"] == 0.5
    assert 0.5 < found["mean"] < 1.0
    assert looks.peak_at_any_phase(run, 0.001) == {"mean": pytest.approx(0.9, abs=0.01), "least": 0.9}


def test_an_interval_holds_the_mean_and_is_a_point_without_scatter(looks: Any):
    mean, low, high = looks.interval_of([0.9, 1.0, 1.1, 0.95, 1.05])
    assert low < mean < high
    assert looks.interval_of([0.5, 0.5]) == pytest.approx((0.5, 0.5, 0.5))
