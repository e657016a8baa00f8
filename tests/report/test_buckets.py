"""Steps reduced to buckets: no peak gets lost, and means, sums and times are those of the steps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvhook.report.buckets import Buckets


def reduced(values, pieces, fewest):
    """What `Buckets` makes of values that come in pieces; step i is from i to i + 0.9 s."""
    buckets, at = Buckets(["a", "b"], fewest), 0
    for size in [*pieces, len(values)]:
        part = np.arange(at, min(at + size, len(values)))
        buckets.take(part.astype(float), part + 0.9, {"a": values[part]})
        at = part[-1] + 1 if len(part) else at
    return buckets.result()


@given(
    st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(float("nan"))), min_size=1, max_size=300),
    st.lists(st.integers(0, 50), max_size=12),
    st.integers(1, 9),
)
@settings(max_examples=150)
def test_every_bucket_is_what_its_steps_are(values, pieces, fewest):
    values = np.array(values)
    r = reduced(values, pieces, fewest)
    assert r.steps == len(values)
    assert len(r.begin) <= 2 * fewest
    assert len(r.begin) == -(-len(values) // r.size)
    for i in range(len(r.begin)):
        mine = values[i * r.size : (i + 1) * r.size]
        known = mine[~np.isnan(mine)]
        assert r.begin[i] == i * r.size
        assert r.end[i] == min((i + 1) * r.size, len(values)) - 1 + 0.9
        assert r.known["a"][i] == len(known)
        assert r.total["a"][i] == pytest.approx(known.sum(), abs=1e-6)
        if len(known):
            assert (r.low["a"][i], r.high["a"][i]) == (known.min(), known.max())
        else:
            assert np.isnan([r.low["a"][i], r.high["a"][i], r.mean("a")[i]]).all()
    assert not r.is_known("b")


@pytest.mark.parametrize("where", [0, 1, 4095, 77_777, 199_999])
def test_a_peak_of_one_step_is_there_however_long_the_run(where: int):
    values = np.zeros(200_000)
    values[where] = 1.0
    r = reduced(values, [8000] * 25, 256)
    assert r.size >= 400
    assert r.high["a"].max() == 1.0
    assert r.high["a"].argmax() == where // r.size


def test_no_steps_are_no_buckets():
    r = Buckets(["a"]).result()
    assert (r.steps, len(r.begin), r.is_known("a")) == (0, 0, False)
