"""Counted values against numpy on the plain list of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvhook.analysis.distribution import distribution, quantiles

number = st.floats(min_value=-1e6, max_value=1e6, allow_nan=False, allow_subnormal=False)
counted = st.lists(st.tuples(number, st.integers(1, 300)), min_size=1, max_size=30)


@given(counted)
def test_counted_values_are_what_numpy_makes_of_the_plain_list(pairs: list[tuple[float, int]]):
    values, counts = np.array([v for v, _ in pairs]), np.array([c for _, c in pairs])
    plain = np.repeat(values, counts)
    d = distribution(values, counts)
    scale = float(np.abs(plain).max())
    assert d.count == len(plain)
    assert d.max == plain.max()
    assert d.mean == pytest.approx(plain.mean(), rel=1e-9, abs=1e-9 * scale)
    for got, q in ((d.p50, 50), (d.p90, 90), (d.p99, 99)):
        assert got == pytest.approx(np.percentile(plain, q), rel=1e-9, abs=1e-9 * scale)


@given(counted, st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_any_quantile_is_numpys(pairs: list[tuple[float, int]], at: list[float]):
    values, counts = np.array([v for v, _ in pairs]), np.array([c for _, c in pairs])
    plain = np.repeat(values, counts)
    expected = np.quantile(plain, at)
    assert quantiles(values, counts, tuple(at)) == pytest.approx(expected, rel=1e-9, abs=1e-9 * np.abs(plain).max())


@given(counted)
def test_order_does_not_matter(pairs: list[tuple[float, int]]):
    a = distribution([v for v, _ in pairs], [c for _, c in pairs])
    b = distribution([v for v, _ in pairs[::-1]], [c for _, c in pairs[::-1]])
    assert (a.count, a.p50, a.p90, a.p99, a.max) == (b.count, b.p50, b.p90, b.p99, b.max)


def test_a_known_list():
    d = distribution([4.0, 1.0, 2.0, 3.0])
    assert (d.count, d.mean, d.p50, d.max) == (4, 2.5, 2.5, 4.0)
    assert (d.p90, d.p99) == pytest.approx((3.7, 3.97))


def test_nan_and_zero_counts_are_left_out():
    d = distribution([1.0, float("nan"), 7.0, 3.0], [1, 5, 0, 1])
    assert (d.count, d.mean, d.max) == (2, 2.0, 3.0)


def test_no_values_give_nan_and_not_zero():
    d = distribution([])
    assert d.count == 0
    assert all(math.isnan(v) for v in (d.mean, d.p50, d.p90, d.p99, d.max))


def test_more_values_than_could_be_written_out():
    d = distribution([1.0, 2.0], [10**15, 10**15])
    assert (d.count, d.mean, d.p90) == (2 * 10**15, 1.5, 2.0)
