"""What the tests of damaged and forged files share."""

from __future__ import annotations

import pytest

from tests.ring.damaged import Files


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("damage"))
