"""The recipe for OpenTelemetry, against its SDK. Those for other tools are not run: they are not installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import kvhook
from tests import recipes
from tests.standin import fake_vllm, step_stats


def test_opentelemetry_has_the_sums_and_the_last_state(fresh: Path):
    metrics = pytest.importorskip("opentelemetry.metrics")
    export = pytest.importorskip("opentelemetry.sdk.metrics.export")
    sdk = pytest.importorskip("opentelemetry.sdk.metrics")
    reader = export.InMemoryMetricReader()
    provider = sdk.MeterProvider(metric_readers=[reader])
    before = metrics.get_meter
    metrics.get_meter = provider.get_meter  # the global provider can be set only once in a process
    try:
        with fake_vllm() as vllm, kvhook.install():
            subscription = recipes.run("OpenTelemetry")["subscription"]
            engine = vllm.engine()
            for n in range(40):
                engine.plan.append(step_stats(kv_cache_usage=n / 100, generated=n, preempted=n % 2))
                engine.step()
            subscription.close()
    finally:
        metrics.get_meter = before
    assert values(reader.get_metrics_data()) == {
        "kvhook.generation_tokens": sum(range(40)),
        "kvhook.preemptions": 20,
        "kvhook.kv_cache.usage": 0.39,
    }
    provider.shutdown()


def values(data: Any) -> dict[str, float]:
    return {
        metric.name: metric.data.data_points[0].value
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }
