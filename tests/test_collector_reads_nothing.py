"""The collector's answers about the present come from running totals: the run is not read for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvhook
from kvhook import VLLMMetricsCollector
from kvhook.analysis.history import STATES, TOTALS, from_steps
from tests.standin import NO_STATS, fake_vllm, step_stats


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> Any:
    """From here on, reading the whole run fails."""

    def forbid() -> None:
        def trace(session: kvhook.Session) -> None:
            raise AssertionError("the whole run is read")

        monkeypatch.setattr(kvhook.Session, "trace", trace)

    return forbid


def work(engine: Any, steps: int) -> None:
    for n in range(steps):
        finished = [{"request_id": str(n), "e2e_latency": 0.1 * n, "num_generation_tokens": 3}] if n % 5 == 0 else []
        stats = step_stats(
            num_running_reqs=n % 7,
            num_waiting_reqs=n % 3,
            kv_cache_usage=n % 11 / 11,
            prefix={"queries": 10, "hits": n % 10},
            generated=n,
            itl=[0.01 * n],
            ttft=[0.5, 0.1 * n],
            finished=finished,
        )
        engine.plan += [stats, NO_STATS]
        engine.step()
        engine.step()


def test_monitoring_starts_and_collects_without_reading_the_run(fresh: Path, unreadable: Any):
    with fake_vllm() as vllm, kvhook.install() as session:
        engine = vllm.engine()
        work(engine, 50)
        rows = from_steps(session.steps(), 0.0)
        ttft = np.repeat(*session.latencies("time_to_first_token"))
        e2e = session.requests()["e2e_latency"]
        last = session.steps()[-1]
        unreadable()
        collector = VLLMMetricsCollector(llm=engine)
        collector.start_monitoring()
        found = collector.collect_current_stats()
        assert found["collection_method"] == "hook"
        for name in (*STATES, *TOTALS):
            known = rows[name][rows[name] == rows[name]]
            if len(known):
                assert found["metrics_found"][name] == known[-1], name
        histogram = found["histogram_data"]["time_to_first_token_seconds"]
        assert histogram["count"] == len(ttft)
        assert histogram["sum"] == pytest.approx(ttft.sum())
        assert histogram["p99"] == pytest.approx(np.quantile(ttft, 0.99))
        assert histogram["buckets"]["0.5"] == int((ttft <= 0.5).sum())
        assert found["histogram_data"]["e2e_request_latency_seconds"]["max"] == e2e.max()
        reading, _ = collector._chain.read()
        assert reading is not None
        assert reading.raw["last_step"]["step"] == last["step"]
        assert session.summary().steps == 100


def test_a_part_of_a_run_begins_without_reading_what_was_before(fresh: Path, unreadable: Any):
    from kvhook.pytest_plugin import Recording

    with fake_vllm() as vllm, kvhook.install() as session:
        engine = vllm.engine()
        work(engine, 20)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kvhook.Session, "trace", None)
            recording = Recording(session)
        work(engine, 3)
        assert recording.summary().steps == 6
