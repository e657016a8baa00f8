"""The generated step path is as it was read and agreed to."""

from __future__ import annotations

import pytest

from tests.golden.publishers import GENERATED, HERE, WRITE, generate


@pytest.mark.parametrize("name", GENERATED)
def test_the_publisher_is_the_one_that_is_written_down(name: str):
    written = (HERE / name).read_text()
    assert generate(GENERATED[name]) == written, f"if the change is meant, read it and write it down: {WRITE}"
