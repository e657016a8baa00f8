"""What the tests of faults share."""

from __future__ import annotations

import pytest

from kvhook import _step


@pytest.fixture(params=["c", "python"])
def both_paths(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The step path in C, and the one in Python."""
    path: str = request.param
    if path == "python":
        monkeypatch.setattr(_step, "native", None)
    elif _step.native is None:
        pytest.skip(f"no extension here: {_step.why_not}")
    return path
