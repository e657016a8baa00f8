"""How sure a number is, against what simulated series show when they are made many times."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from kvhook.analysis.compare import error_of_difference
from kvhook.analysis.resample import (
    Spread,
    block_length,
    error_of_mean,
    spread_of_quantile,
    spread_of_ratio,
    t_quantile,
)

Floats = npt.NDArray[np.float64]
#: Makes so many series of so many steps.
Make = Callable[[np.random.Generator, int, int], Floats]


def tied(tie: float) -> Make:
    """Each step is the one before, in part: AR(1)."""

    def make(random: np.random.Generator, series: int, steps: int) -> Floats:
        noise = random.normal(size=(series, steps + 100))
        value = np.zeros(series)
        out = []
        for at in range(steps + 100):
            value = tie * value + noise[:, at]
            out.append(value)
        return np.array(out[100:]).T

    return make


def phases(change: float, noise: float) -> Make:
    """Two phases that take turns at random, with noise on top."""

    def make(random: np.random.Generator, series: int, steps: int) -> Floats:
        turns = np.cumsum(random.random((series, steps)) < change, axis=1) % 2
        return turns + noise * random.normal(size=(series, steps))

    return make


def moving(width: int) -> Make:
    """The mean of the last so many steps of noise."""

    def make(random: np.random.Generator, series: int, steps: int) -> Floats:
        up_to = np.cumsum(random.normal(size=(series, steps + width)), axis=1)
        return (up_to[:, width:] - up_to[:, :-width]) / width

    return make


SERIES = {
    "independent": tied(0.0),
    "tied closely": tied(0.9),
    "tied very closely": tied(0.97),
    "phases": phases(0.05, 0.0),
    "phases under noise": phases(0.05, 0.7),
    "moving mean": moving(20),
}


def verdicts(make: Make, difference: float, *levels: float, steps: int = 400, pairs: int = 250) -> list[float]:
    """For each level the share of pairs of runs in which a difference is found."""
    random = np.random.default_rng(1)
    first, second = make(random, pairs, steps) + 10, make(random, pairs, steps) + 10 + difference
    found = np.zeros(len(levels))
    for a, b in zip(first, second, strict=True):
        spreads = [spread_of_ratio(values, np.ones(steps)) for values in (a, b)]
        if all(spreads):
            error, freedom = error_of_difference([[s] for s in spreads if s])
            found += [abs(b.mean() - a.mean()) > error * t_quantile(1 - level / 2, freedom) for level in levels]
    shares: list[float] = (found / pairs).tolist()
    return shares


@pytest.mark.parametrize("name", SERIES)
def test_runs_without_a_difference_rarely_get_a_verdict(name: str):
    one_number, one_of_a_table = verdicts(SERIES[name], 0.0, 0.05, 0.05 / 14)
    # 5 % at most are meant; three standard deviations of 250 tries are 4.1 %
    assert one_number <= 0.091
    # of a table of 14 numbers each has 0.36 %, so that a table has 5 %
    assert one_of_a_table <= 0.016


def test_who_takes_steps_for_independent_finds_differences_where_there_are_none():
    """The same test with the error that independent steps would have: this is what the blocks are for."""
    random = np.random.default_rng(1)
    first, second = (SERIES["tied closely"](random, 300, 600) for _ in range(2))
    error = np.sqrt((first.var(axis=1) + second.var(axis=1)) / 600)
    assert np.mean(np.abs(first.mean(axis=1) - second.mean(axis=1)) > 1.96 * error) > 0.5


@pytest.mark.parametrize(("name", "difference"), [("independent", 0.4), ("tied closely", 4.0), ("phases", 0.8)])
def test_a_real_difference_is_found(name: str, difference: float):
    assert verdicts(SERIES[name], difference, 0.05 / 14, pairs=100)[0] >= 0.8


@pytest.mark.parametrize("name", SERIES)
def test_the_error_is_that_of_many_runs(name: str):
    """The standard deviation of the means of many runs is what one run's error says, give or take a third; the moving
    mean is taken for more closely tied than it is."""
    random = np.random.default_rng(2)
    runs = SERIES[name](random, 300, 1000)
    true = runs.mean(axis=1).std()
    said = np.median([error_of_mean(run)[0] for run in runs[:60]])
    assert 0.75 * true <= said <= (1.7 if name == "moving mean" else 1.35) * true


def test_a_ratio_has_the_error_of_the_ratio_and_not_of_its_parts():
    """Hits go with look-ups: both vary widely from step to step, their ratio hardly does."""
    random = np.random.default_rng(3)
    rates = []
    errors = []
    for _ in range(200):
        queries = random.poisson(100, 500).astype(float) * (random.random(500) < 0.3)
        hits = random.binomial(queries.astype(int), 0.4).astype(float)
        rates.append(hits.sum() / queries.sum())
        spread = spread_of_ratio(hits, queries)
        assert spread is not None
        assert spread.estimate == pytest.approx(rates[-1])
        errors.append(spread.error)
    assert 0.75 <= np.median(errors) / np.std(rates) <= 1.35


def quantile(values: Floats, share: float) -> float:
    return float(np.quantile(values, share))


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_the_error_of_a_quantile_is_that_of_many_runs(share: float):
    random = np.random.default_rng(4)
    runs = np.exp(tied(0.7)(random, 300, 1000))
    true = np.quantile(runs, share, axis=1).std()
    errors = []
    for run in runs[:60]:
        below = (run <= np.quantile(run, share)).astype(float)
        spread = spread_of_quantile(share, below, np.ones(len(run)), functools.partial(quantile, run))
        assert spread is not None
        errors.append(spread.error)
    assert 0.7 <= np.median(errors) / true <= 1.4


def test_too_few_values_say_nothing():
    ones = np.ones(100)
    assert spread_of_ratio(np.ones(10), np.ones(10)) is None
    # a run that drifts from one end to the other has no mean to be sure of: independent steps would say 0.037
    drifts = spread_of_ratio(np.array([step / 59 for step in range(60)]), np.ones(60))
    assert drifts is None or (drifts.error > 0.1 and drifts.blocks < 6)
    values = np.array([float(v) for v in range(100)])
    assert (
        spread_of_quantile(0.99, (values <= 98).astype(float), ones, lambda at: float(np.quantile(values, at))) is None
    )


def test_a_number_that_never_changes_has_no_error():
    spread = spread_of_ratio(np.full(50, 0.3), np.ones(50))
    assert spread is not None
    assert spread.estimate == pytest.approx(0.3)
    assert spread.error == 0


def test_a_long_series_is_added_up_first_and_says_the_same():
    random = np.random.default_rng(5)
    run = tied(0.9)(random, 1, 40_000)[0]
    spread = spread_of_ratio(run + 10, np.ones(len(run)))
    assert spread is not None
    assert spread.estimate == pytest.approx(10 + run.mean())
    assert 0.75 <= spread.error / (10 / math.sqrt(len(run))) <= 1.35  # an AR(1) with 0.9 has 1 / (1 - 0.9) / sqrt(n)


def test_blocks_are_longer_where_steps_are_tied():
    random = np.random.default_rng(6)
    lengths = [np.mean([block_length(run) for run in tied(tie)(random, 40, 1000)]) for tie in (0.0, 0.5, 0.9)]
    assert lengths[0] < lengths[1] < lengths[2]
    # Politis and White's optimum for an AR(1), n = 1000, circular blocks: (1.5 (2 rho / (1 - rho^2))^2)^(1/3) n^(1/3)
    for tie, length in ((0.5, lengths[1]), (0.9, lengths[2])):
        assert 0.6 <= length / (1.5 * (2 * tie / (1 - tie**2)) ** 2 * 1000) ** (1 / 3) <= 1.6


@pytest.mark.parametrize(
    ("share", "freedom", "tabled"),
    [(0.975, 1, 12.7062), (0.995, 5, 4.03214), (0.975, 10, 2.22814), (0.9995, 30, 3.64596), (0.975, 1e9, 1.95996)],
)
def test_student_s_quantiles_are_those_of_the_tables(share: float, freedom: float, tabled: float):
    assert t_quantile(share, freedom) == pytest.approx(tabled, rel=3e-4)
    assert t_quantile(1 - share, freedom) == pytest.approx(-tabled, rel=3e-4)


def test_repeats_that_differ_more_than_their_steps_widen_the_error():
    close = [Spread(10.0, 0.1, 50, 1), Spread(10.05, 0.1, 50, 1)]
    apart = [Spread(9.0, 0.1, 50, 1), Spread(11.0, 0.1, 50, 1)]
    other = [Spread(12.0, 0.1, 50, 1)]
    error, freedom = error_of_difference([close, other])
    assert error == pytest.approx(math.sqrt(0.1**2 / 2 + 0.1**2))
    assert freedom > 49
    # the variance between the repeats is 2, of one run 2, of the mean of two 1; one degree of freedom
    error, freedom = error_of_difference([apart, other])
    assert error == pytest.approx(math.sqrt(2 + 1))
    assert freedom == pytest.approx(9 / 5)
