"""The soak's short form; the long one is `make soak`."""

from __future__ import annotations

import pytest

from tests.faults.soak import soak

SECONDS = 6.0


@pytest.mark.usefixtures("fresh")
def test_thousands_of_steps_with_readers_that_are_killed_lose_nothing_and_nothing_grows():
    found = soak(SECONDS)
    assert found.complaints() == []
    assert found.steps > 2000
    assert found.readers > 0
