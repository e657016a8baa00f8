"""The history of a collector: cut into parts, saved as CSV and JSON, and as a data frame."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvhook
from kvhook import VLLMMetricsCollector
from kvhook.analysis.history import cut, even_edges, from_samples, monitored
from kvhook.collector import names
from tests.collector.sources import polled


def test_parts_hold_differences_and_peaks():
    history = from_samples(
        [
            (1.0, {"prefix_cache_queries": 10, "prefix_cache_hits": 0, "kv_cache_usage": 0.5, "num_waiting_reqs": 1}),
            (2.0, {"prefix_cache_queries": 30, "prefix_cache_hits": 15, "kv_cache_usage": 0.9, "num_waiting_reqs": 4}),
            (3.0, {"prefix_cache_queries": 40, "prefix_cache_hits": 25, "kv_cache_usage": 0.1}),
        ],
        1000.0,
    )
    first, second = cut(history, [1.0, 2.0, 3.0])
    assert (first["prefix_cache_queries"], first["prefix_cache_hits"], first["prefix_cache_hit_rate"]) == (20, 15, 0.75)
    assert (second["prefix_cache_queries"], second["prefix_cache_hit_rate"]) == (10, 1.0)
    assert second["prefix_cache_hit_rate_so_far"] == 25 / 30
    assert (first["kv_cache_usage_peak"], first["num_waiting_reqs_peak"]) == (0.9, 4)
    assert (second["num_waiting_reqs_peak"], second["num_prompt_tokens"]) == (None, None)
    assert (first["begin"], first["end"]) == (1001.0, 1002.0)
    (whole,) = cut(history, [-np.inf, np.inf])
    assert (whole["prefix_cache_queries"], whole["kv_cache_usage"]) == (40, 0.1)


def lookups(t: float, queries: int, hits: int) -> tuple[float, dict[str, float]]:
    return t, {"prefix_cache_queries": queries, "prefix_cache_hits": hits}


def test_the_hit_rate_of_monitored_times_leaves_out_what_was_looked_up_outside_of_them():
    history = from_samples(
        [lookups(1, 100, 0), lookups(2, 100, 0), lookups(3, 110, 10), lookups(4, 500, 10), lookups(5, 510, 15)], 0.0
    )
    first, second = monitored(history, [(1.5, 3.0), (4.0, 9.0)])
    assert first.rows["t"].tolist() == [2, 3]
    assert (np.isnan(first.hit_rate[0]), first.hit_rate[1]) == (True, 1.0)
    # the sample at the beginning of a monitored time tells what was there before it
    assert second.rows["t"].tolist() == [4, 5]
    assert second.hit_rate.tolist() == [1.0, 0.75]
    (whole,) = monitored(history, [(-np.inf, np.inf)])
    assert whole.hit_rate[-1] == 15 / 510


def test_a_hit_rate_that_is_not_known_is_not_drawn_as_0():
    unknown = from_samples([(1.0, {}), (2.0, {})], 0.0)
    falls = from_samples([lookups(1, 100, 50), lookups(2, 10, 5)], 0.0)
    for history in (unknown, falls):
        (part,) = monitored(history, [(1.0, 3.0)])
        assert np.isnan(part.hit_rate).all()


def test_a_total_that_falls_is_not_known():
    history = from_samples([(1.0, {"num_prompt_tokens": 10}), (2.0, {"num_prompt_tokens": 4})], 0.0)
    assert cut(history, [1.0, 2.0])[0]["num_prompt_tokens"] is None


def test_parts_of_nothing_hold_nothing():
    (part,) = cut(from_samples([], 0.0), [-np.inf, np.inf])
    assert {value for name, value in part.items() if name != "rows"} == {None}


@pytest.mark.parametrize(("rows", "parts", "expected"), [(5, 10, 5), (10, 5, 5), (1, 3, 1), (0, 3, 0)])
def test_even_edges_cut_all_rows(rows: int, parts: int, expected: int):
    history = from_samples([(float(i + 1), {}) for i in range(rows)], 0.0)
    found = cut(history, even_edges(history, -np.inf, np.inf, parts))
    assert len(found) == expected
    assert sum(part["rows"] for part in found) == rows


# Files and frames


def test_save_as_csv_and_json(tmp_path: Path):
    engine, collector = polled()
    for usage in (0.5, 0.75):
        engine.stats.gpu_cache_usage_sys = usage
        collector.collect_current_stats()
    with open(collector.save_metrics(tmp_path / "x.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["kv_cache_usage"] for row in rows] == ["0.5", "0.75"]
    assert {row["num_prompt_tokens"] for row in rows} == {""}
    assert {row["num_running_reqs"] for row in rows} == {"3"}, "counts are whole numbers"
    assert {row["collection_method"] for row in rows} == {names.INTERNAL}
    saved = json.loads(collector.save_metrics(str(tmp_path / "x.json")).read_text())
    assert saved["key_metrics"]["gpu_cache_usage_sys"] == 0.75
    assert len(saved["history"]) == 3
    with pytest.raises(kvhook.KvhookError, match=r"\.csv .* or \.json"):
        collector.save_metrics(tmp_path / "x.xls")
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["x.csv", "x.json"]


NEEDS: list[tuple[str, str, Callable[[VLLMMetricsCollector], Any]]] = [
    ("pandas", "pandas", lambda c: c.history_frame()),
    ("matplotlib", "plot", lambda c: c.plot_kv_cache_metrics()),
]


@pytest.mark.parametrize(("package", "extra", "call"), NEEDS, ids=[n[0] for n in NEEDS])
def test_a_missing_package_is_named_with_what_installs_it(
    package: str, extra: str, call: Callable[[VLLMMetricsCollector], Any], tmp_path: Path, monkeypatch: Any
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    _engine, collector = polled()
    collector.collect_current_stats()
    with pytest.raises(kvhook.KvhookError, match=rf"{package}.*kvhook\[{extra}\]"):
        call(collector)


def test_history_as_a_data_frame():
    pytest.importorskip("pandas")
    _engine, collector = polled()
    collector.collect_current_stats()
    frame = collector.history_frame()
    assert frame["kv_cache_usage"].tolist() == [0.25]
    assert str(frame.index.tz) == "UTC"
