"""What these tests share. Here no message of kvhook's is passed over, and each begins without engines of another."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator

import pytest

from tests.contracts.behaviour import VllmLogger


@pytest.fixture(autouse=True)
def _forget_loggers() -> Iterator[None]:
    gc.collect()  # no engine of an earlier test is alive
    VllmLogger.made.clear()
    yield
    VllmLogger.made.clear()


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The warnings that kvhook has given so far."""
    return lambda: [r.getMessage() for r in caplog.records if r.name == "kvhook" and r.levelno >= logging.WARNING]
