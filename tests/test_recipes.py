"""The recipes of docs/howto/stream.md, each against the real library, which sends nothing anywhere.

W&B, MLflow and TensorBoard are installed by ``make frameworks``. Where they are not, their tests are skipped.
"""

from __future__ import annotations

import time
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


def send(heading: str) -> dict[str, Any]:
    """Run a recipe, and forty steps of an engine."""
    with fake_vllm() as vllm, kvhook.install():
        space = recipes.run(heading)
        engine = vllm.engine()
        for n in range(40):
            engine.plan.append(step_stats(kv_cache_usage=n / 100, generated=n, preempted=n % 2))
            engine.step()
        space["subscription"].close()
    return space


def test_weights_and_biases_has_every_step(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("wandb")
    for name, value in (("WANDB_DIR", str(tmp_path)), ("WANDB_SILENT", "true"), ("WANDB_ERROR_REPORTING", "false")):
        monkeypatch.setenv(name, value)
    run = send("Weights & Biases")["run"]
    try:
        last = dict(run.summary)
        logged = run.step
    finally:
        run.finish()
    assert logged == 40
    assert (last["step"], last["kv_cache/kv_cache_usage"], last["kv_cache/num_generation_tokens"]) == (39, 0.39, 39)
    assert last["kv_cache/num_preempted_reqs"] == 1
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_mlflow_has_every_step(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    space = send("MLflow")
    try:
        history = space["client"].get_metric_history(space["run"].info.run_id, "kv_cache_usage")
        tokens = space["client"].get_metric_history(space["run"].info.run_id, "num_generation_tokens")
    finally:
        mlflow.end_run()
    assert sorted((m.step, m.value) for m in history) == [(n, n / 100) for n in range(40)]
    assert sum(m.value for m in tokens) == sum(range(40))


def test_tensorboard_has_every_step(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("torch")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.chdir(tmp_path)
    begun = time.time()
    send("TensorBoard")["writer"].close()
    found = accumulator.EventAccumulator(str(tmp_path / "runs/kv-cache"), size_guidance={"scalars": 0}).Reload()
    usage, tokens = (found.Scalars(f"kv_cache/{name}") for name in ("kv_cache_usage", "num_generation_tokens"))
    assert [one.step for one in usage] == list(range(40))
    assert [one.value for one in usage] == pytest.approx([n / 100 for n in range(40)])
    assert sum(one.value for one in tokens) == sum(range(40))
    assert begun <= usage[0].wall_time <= usage[-1].wall_time <= time.time()


def values(data: Any) -> dict[str, float]:
    return {
        metric.name: metric.data.data_points[0].value
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }
