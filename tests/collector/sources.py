"""What a collector reads, made by hand: engines with their own objects, and metrics in a Prometheus registry."""

from __future__ import annotations

import json
import sys
import threading
import types
from dataclasses import dataclass, field
from typing import Any

import pytest

from kvhook import VLLMMetricsCollector
from kvhook.collector import names

COLLECTION = (
    *("collection_method", "stats_available", "metrics_found", "histogram_data", "total_metrics_found"),
    *("total_histograms_found", "debug_info", "timestamp", "collection_time"),
)


def strict(answer: Any) -> str:
    return json.dumps(answer, allow_nan=False)


# The engine's own objects


@dataclass
class V0Stats:
    num_running_sys: int = 3
    num_waiting_sys: int = 4
    gpu_cache_usage_sys: float = 0.25
    cpu_cache_usage_sys: float = 0.0
    gpu_prefix_cache_hit_rate: float = 0.5
    cpu_prefix_cache_hit_rate: float = -1.0


@dataclass(eq=False)
class V0Engine:
    """Makes V0's Stats on request; `asked` is released each time."""

    stats: V0Stats = field(default_factory=V0Stats)
    asked: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    vllm_config: Any = None

    def _get_stats(self, scheduler_outputs: Any) -> V0Stats:
        assert scheduler_outputs is None
        self.asked.release()
        return self.stats

    def wait_until_asked(self, times: int = 1) -> None:
        for _ in range(times):
            assert self.asked.acquire(timeout=60)


def v1_engine(*, in_process: bool = True, loggers: tuple[Any, ...] = ()) -> Any:
    engine = type("LLMEngine", (), {})()
    engine.logger_manager = types.SimpleNamespace(stat_loggers=list(loggers))
    scheduler = types.SimpleNamespace(
        running=[1], waiting=[1, 2], kv_cache_manager=types.SimpleNamespace(usage=0.5, prefix_cache_stats=None)
    )
    engine.engine_core = types.SimpleNamespace()
    if in_process:
        engine.engine_core.engine_core = types.SimpleNamespace(scheduler=scheduler)
    return engine


def polled(interval: float = 3600.0) -> tuple[V0Engine, VLLMMetricsCollector]:
    engine = V0Engine()
    return engine, VLLMMetricsCollector(engine, interval, source=names.INTERNAL)


# The registry


@dataclass
class Sample:
    name: str
    labels: dict[str, str]
    value: float


@dataclass
class Metric:
    name: str
    type: str
    samples: list[Sample]


def counter(name: str, *totals: float, created: float = 1795477950.68) -> Metric:
    """A counter as prometheus_client gives it: for each label set a total, and the time at which it was made."""
    samples = []
    for i, total in enumerate(totals):
        labels = {"engine": str(i)}
        samples += [Sample(f"{name}_total", labels, total), Sample(f"{name}_created", labels, created)]
    return Metric(name, "counter", samples)


def gauge(name: str, *values: float, **labels: str) -> Metric:
    return Metric(name, "gauge", [Sample(name, {"engine": str(i), **labels}, v) for i, v in enumerate(values)])


def from_registry(monkeypatch: pytest.MonkeyPatch, *metrics: Metric) -> dict[str, Any]:
    client: Any = types.ModuleType("prometheus_client")
    client.REGISTRY = types.SimpleNamespace(collect=lambda: list(metrics))
    monkeypatch.setitem(sys.modules, "prometheus_client", client)
    found = VLLMMetricsCollector(source=names.REGISTRY).get_comprehensive_stats()
    strict(found)
    return found
