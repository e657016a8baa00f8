"""The plot of a collector's history."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvhook
from kvhook import VLLMMetricsCollector
from tests.collector.sources import V0Engine, V0Stats, polled
from tests.standin import step_stats


def test_plot(tmp_path: Path, recorded: tuple[Any, VLLMMetricsCollector]):
    pytest.importorskip("matplotlib")
    (picture,) = recorded[1].plot_kv_cache_metrics(tmp_path / "new")
    assert picture.read_bytes()[:4] == b"\x89PNG"


def drawn(monkeypatch: pytest.MonkeyPatch, collector: VLLMMetricsCollector, folder: Path) -> Any:
    """The figure, as it is handed to be printed."""
    agg = pytest.importorskip("matplotlib.backends.backend_agg")
    figures = []
    monkeypatch.setattr(agg.FigureCanvasAgg, "print_figure", lambda canvas, *_, **__: figures.append(canvas.figure))
    collector.plot_kv_cache_metrics(folder)
    return figures[0]


def test_the_plot_shows_the_monitored_time_alone(
    tmp_path: Path, recorded: tuple[Any, VLLMMetricsCollector], monkeypatch: pytest.MonkeyPatch
):
    engine, collector = recorded
    collector.stop_monitoring()
    engine.plan.append(step_stats(kv_cache_usage=0.5, prefix={"queries": 100, "hits": 100}))
    engine.step()
    collector.start_monitoring()
    engine.plan.append(step_stats(kv_cache_usage=0.75, prefix={"queries": 100, "hits": 0}))
    engine.step()
    figure = drawn(monkeypatch, collector, tmp_path)
    assert figure.get_suptitle() == "hook: every engine step (3)"
    usage, _requests, rate = figure.axes
    np.testing.assert_array_equal(usage.lines[0].get_ydata(), [100, 0, np.nan, 75])
    np.testing.assert_allclose(rate.lines[0].get_ydata(), [50, 62.5, np.nan, 100 * 125 / 300], rtol=1e-12)
    assert usage.get_title(loc="right") == "peak 100.0 %"


def test_a_plot_without_a_hit_rate_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    engine = V0Engine(V0Stats(gpu_prefix_cache_hit_rate=-1.0))
    collector = VLLMMetricsCollector(engine)
    collector.collect_current_stats()
    figure = drawn(monkeypatch, collector, tmp_path)
    assert figure.get_suptitle() == "internal_engine_stats: a single sample"
    rate = figure.axes[2]
    assert not rate.lines
    assert "prefix caching is off" in rate.texts[0].get_text()


def test_the_plot_of_v0_has_its_own_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    engine, collector = polled()
    collector.collect_current_stats()
    rate = drawn(monkeypatch, collector, tmp_path).axes[2]
    assert rate.lines[0].get_ydata().tolist() == [50]
    assert "of blocks" in rate.get_ylabel()
    assert engine.stats.gpu_prefix_cache_hit_rate == 0.5


def test_nothing_to_draw_is_said(tmp_path: Path):
    with pytest.raises(kvhook.KvhookError, match="nothing to draw"):
        VLLMMetricsCollector().plot_kv_cache_metrics(tmp_path)
