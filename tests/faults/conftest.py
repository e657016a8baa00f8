"""What all tests of faults share."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _quick_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each session measures what a call costs with cold caches, which takes longer than most of these tests."""
    monkeypatch.setattr("kvhook.recording.owner.call_overhead_ns", lambda: 100)
