"""Monitoring: it begins and ends when it is told to, samples in a thread, and survives its engine."""

from __future__ import annotations

import gc
import logging
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvhook import VLLMMetricsCollector
from kvhook.collector import names
from tests.collector.sources import V0Engine, V0Stats, counter, polled
from tests.conftest import Python


def is_on(collector: VLLMMetricsCollector) -> bool:
    return collector.monitoring


def test_start_stop_start_and_twice():
    engine, collector = polled()
    assert not is_on(collector)
    collector.stop_monitoring()
    assert not is_on(collector)
    collector.start_monitoring()
    thread = collector.sampling_thread
    collector.start_monitoring()
    assert is_on(collector)
    assert collector.sampling_thread is thread
    collector.stop_monitoring()
    collector.stop_monitoring()
    assert not is_on(collector)
    assert thread is not None
    assert not thread.is_alive()
    assert len(collector.history()) == 2, "a sample at the start and one at the end"
    engine.stats.num_running_sys = 7
    collector.collect_current_stats()
    assert len(collector.history()) == 2, "between two monitored times"
    collector.start_monitoring()
    collector.stop_monitoring()
    assert collector.history()["num_running_reqs"].tolist() == [3, 3, 7, 7]


def test_the_thread_samples_at_the_interval():
    engine, collector = polled(0.001)
    collector.start_monitoring()
    thread = collector.sampling_thread
    assert thread is not None
    assert thread.daemon
    engine.wait_until_asked(20)
    collector.stop_monitoring()
    assert not thread.is_alive()
    rows = collector.history()
    assert len(rows) >= 20
    assert (np.diff(rows["t"]) > 0).all()
    stats = collector.get_comprehensive_stats()
    assert (stats["total_collections"], stats["collection_method"]) == (len(rows), names.INTERNAL)
    assert stats["summary"]["of"] == "samples 0.001 s apart"


def test_with_statement():
    _engine, collector = polled()
    with collector:
        thread = collector.sampling_thread
        assert is_on(collector)
    assert not is_on(collector)
    assert thread is not None
    assert not thread.is_alive()


def test_disabled_monitoring_still_collects_by_hand():
    engine = V0Engine()
    collector = VLLMMetricsCollector(engine, 0.001, False)
    collector.start_monitoring()
    assert not is_on(collector)
    assert collector.sampling_thread is None
    assert collector.collect_current_stats()["metrics_found"]["num_running_sys"] == 3
    assert len(collector.history()) == 1


def test_a_collector_that_is_dropped_takes_its_thread_along():
    _engine, collector = polled(0.001)
    collector.start_monitoring()
    thread = collector.sampling_thread
    assert thread is not None
    del collector
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()


def test_the_thread_ends_when_the_engine_goes_first():
    engine, collector = polled(0.001)
    collector.start_monitoring()
    thread = collector.sampling_thread
    assert thread is not None
    del engine
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()
    assert collector.get_comprehensive_stats()["collection_method"] == "unavailable"
    collector.stop_monitoring()


def test_the_registry_is_not_asked_for_an_engine_that_is_gone(monkeypatch: pytest.MonkeyPatch):
    """Another engine's numbers may be in there by then."""
    client: Any = types.ModuleType("prometheus_client")
    client.REGISTRY = types.SimpleNamespace(collect=lambda: [counter("vllm:prompt_tokens", 7)])
    monkeypatch.setitem(sys.modules, "prometheus_client", client)
    engine = V0Engine()
    collector = VLLMMetricsCollector(engine, source=names.REGISTRY)
    collector.start_monitoring()
    collector.stop_monitoring()
    del engine
    gc.collect()
    found = collector.collect_current_stats()
    assert found["collection_method"] == names.UNAVAILABLE
    assert "deleted" in found["debug_info"]["not_available"][names.REGISTRY]
    assert collector.history()["num_prompt_tokens"].tolist() == [7, 7], "what was seen of it stays"


def test_an_engine_that_fails_while_it_is_sampled_ends_nothing():
    engine, collector = polled(0.001)

    class Broken:
        @property
        def num_running_sys(self) -> int:
            engine.asked.release()
            raise OSError("the device is gone")

    collector.start_monitoring()
    engine.stats = Broken()  # type: ignore[assignment]
    engine.wait_until_asked(20)
    engine.stats = V0Stats()
    stats = collector.get_comprehensive_stats()
    collector.stop_monitoring()
    assert stats["key_metrics"]["num_running_sys"] == 3
    (error,) = stats["errors"]
    assert (error["where"], error["error"]) == ("reading internal_engine_stats", "OSError: the device is gone")
    assert error["times"] >= 1


def test_the_interpreter_exits_while_monitoring_is_on(python: Python):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from tests.collector.sources import polled\n"
        "engine, collector = polled(0.001)\n"
        "collector.start_monitoring()\n"
        "engine.wait_until_asked(5)\n"
        "print('end')"
    )
    done = python(code, Path(__file__).parents[2])
    assert done.stdout == "end\n"
    assert "Traceback" not in done.stderr


def test_falling_back_is_said_once(caplog: pytest.LogCaptureFixture):
    collector = VLLMMetricsCollector(V0Engine(), 3600)
    with caplog.at_level(logging.WARNING, "kvhook"):
        collector.start_monitoring()
        for _ in range(3):
            collector.collect_current_stats()
        collector.stop_monitoring()
    (line,) = [r.getMessage() for r in caplog.records if "source" in r.getMessage()]
    assert names.INTERNAL in line
    assert f"{names.HOOK}: " in line


def test_a_forced_source_is_no_falling_back(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "kvhook"):
        _engine, collector = polled()
        collector.collect_current_stats()
    assert not caplog.records
