"""The two step paths, in Python and in C, record the same bytes and fail alike, whatever vLLM may hand over.

``KVHOOK_SEEDS=200000`` in the environment plays so many scenarios more.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.step.two_paths import TABLES, differences, have_native

pytestmark = pytest.mark.skipif(not have_native(), reason="the extension is not built here")


@given(st.integers(0, 2**60))
@settings(max_examples=300)
def test_any_scenario_gives_the_same_records_and_the_same_faults(seed: int):
    assert differences(seed) == []


@pytest.mark.parametrize("where", TABLES, ids=lambda w: "-".join(w))
def test_each_table_gives_the_same_records_and_the_same_faults(where: tuple[str, str, str]):
    for seed in range(60 + int(os.environ.get("KVHOOK_SEEDS", "0")) // len(TABLES)):
        assert differences(seed, where) == []
