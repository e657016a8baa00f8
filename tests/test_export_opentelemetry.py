"""The OpenTelemetry example, with OpenTelemetry's own exporters: in memory, and over HTTP to a collector's stand-in."""

from __future__ import annotations

import http.server
import importlib.util
import os
import runpy
import sys
import threading
from typing import Any

import pytest

import kvhook
from tests.conftest import ROOT

pytest.importorskip("opentelemetry.sdk")

TRACE = ROOT / "tests/data/engine-0.32.0-full.kvh"
EXAMPLE = ROOT / "examples/to_opentelemetry.py"


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("to_opentelemetry", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_spans_and_counters_are_those_of_the_trace(example: Any):
    trace = kvhook.open(TRACE)
    memory, reader = example.InMemorySpanExporter(), example.InMemoryMetricReader()
    example.send(trace, memory, reader, at_once=True)
    spans = memory.get_finished_spans()
    requests = trace.requests()
    whole = {s.context.span_id: s for s in spans if s.name == "request"}
    assert len(whole) == len(requests) == 12
    lengths = sorted((s.end_time - s.start_time) / 1e9 for s in whole.values())
    assert lengths == pytest.approx(sorted(requests["e2e_latency"].tolist()), abs=1e-6)
    sums = {
        key: sum(s.attributes[key] for s in whole.values())
        for key in ("gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens", "kvhook.cached_tokens")
    }
    columns = ("num_prompt_tokens", "num_generation_tokens", "num_cached_tokens")
    assert list(sums.values()) == [int(requests[c].sum()) for c in columns]
    for phase, column in (("prefill", "prefill_time"), ("decode", "decode_time")):
        mine = [s for s in spans if s.name == phase]
        assert all(s.parent.span_id in whole for s in mine)
        took = sorted((s.end_time - s.start_time) / 1e9 for s in mine)
        assert took == pytest.approx(sorted(requests[column].tolist()), abs=1e-6)
    (counted,) = reader.get_metrics_data().resource_metrics
    values = {m.name: m.data.data_points[0].value for m in counted.scope_metrics[0].metrics}
    steps = trace.steps()
    assert values == {name: int(steps[column].sum()) for name, column in example.COUNTERS.items()}
    # on the wall clock: the run's
    assert abs(min(s.start_time for s in spans) - trace.meta["realtime_ns"]) < 60e9


def test_a_run_without_single_requests_sends_its_counters(example: Any):
    memory, reader = example.InMemorySpanExporter(), example.InMemoryMetricReader()
    example.send(kvhook.open(ROOT / "tests/data/engine-0.32.0-light.kvh"), memory, reader, at_once=True)
    assert memory.get_finished_spans() == ()
    assert reader.get_metrics_data().resource_metrics


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    for name in os.environ:
        if name.startswith("OTEL_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), str(TRACE)])

    def run_example(**environment: str) -> str:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        runpy.run_path(str(EXAMPLE), run_name="__main__")
        return capsys.readouterr().out

    return run_example


def test_without_a_collector_it_says_what_it_would_send(run: Any):
    assert run().splitlines()[:2] == ["12 requests, 48 spans", "vllm.prefix_cache.queries 804"]


def test_with_a_collector_it_sends_them(run: Any):
    got: dict[str, bytes] = {}

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        run(OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{server.server_port}", OTEL_EXPORTER_OTLP_COMPRESSION="none")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert got["/v1/traces"].count(b"request") >= 12
    assert b"vllm.prefix_cache.hits" in got["/v1/metrics"]
