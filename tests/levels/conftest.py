"""What the tests of the levels share: a vLLM to record, what kvhook warns of, and a budget that waits for nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest

from kvhook.recording import budget as cost
from tests.contracts.core_engines import engines_of
from tests.contracts.loader import stubs


@pytest.fixture(autouse=True)
def vllm() -> Iterator[None]:
    with stubs(engines_of("0.32.0")):
        yield


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The warnings that kvhook has given so far."""
    return lambda: [r.getMessage() for r in caplog.records if r.name == "kvhook" and r.levelno >= logging.WARNING]


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sample over the budget is enough to step down."""
    monkeypatch.setattr(cost, "WINDOW", 1)
    monkeypatch.setattr(cost, "WINDOWS", 1)
