"""What the tests of the adapters share, at every level."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator

import pytest

from tests.contracts.behaviour import VllmLogger


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The warnings that kvhook has given so far, without that about old releases' engine cores (`test_core.py`)."""
    gc.collect()  # no engine of an earlier test is alive, about which kvhook would say that it exists already

    def given() -> list[str]:
        warnings = [r.getMessage() for r in caplog.records if r.name == "kvhook" and r.levelno >= logging.WARNING]
        return [text for text in warnings if "engine cores are recorded from vLLM 0.8.3 on" not in text]

    return given


@pytest.fixture(autouse=True)
def _forget_loggers() -> Iterator[None]:
    VllmLogger.made.clear()
    yield
    VllmLogger.made.clear()
