"""What all tests of the collector share: nothing is installed before one, and a recording by the hook."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kvhook
from kvhook import VLLMMetricsCollector
from tests.standin import fake_vllm, step_stats


@pytest.fixture(autouse=True)
def _fresh(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is installed, and no Prometheus of another test is looked at."""
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "prometheus_client")


#: Of the cache, step by step.
USAGE = (0.0, 0.25, 1.0, 0.0)


@pytest.fixture
def recorded() -> Iterator[tuple[Any, VLLMMetricsCollector]]:
    """Four steps of a stand-in engine, the collector started after the second."""
    with fake_vllm() as vllm:
        kvhook.install()
        engine = vllm.engine(log_stats=False)
        engine.plan += [
            step_stats(kv_cache_usage=u, prefix={"queries": 100, "hits": 25 * i}, generated=2, itl=[0.02, 0.03])
            for i, u in enumerate(USAGE)
        ]
        collector = VLLMMetricsCollector(engine)
        for i in range(4):
            if i == 2:
                collector.start_monitoring()
            engine.step()
        yield engine, collector
