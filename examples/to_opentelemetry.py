"""Send a recorded run to OpenTelemetry: a span for each request, with its phases, and counters for each engine.

Needs `pip install opentelemetry-sdk`, and `opentelemetry-exporter-otlp-proto-http` to send them anywhere:

    OTEL_EXPORTER_OTLP_ENDPOINT=http://localhost:4318 python examples/to_opentelemetry.py run.kvh

Without that variable they stay in memory, and it prints what would have been sent.
"""

from __future__ import annotations

import argparse
import os
from itertools import pairwise
from typing import Any

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import set_span_in_context

import kvhook
from kvhook.analysis.timeline import timeline

#: Counter -> the column of the steps that is summed.
COUNTERS = {
    "vllm.prefix_cache.queries": "prefix_cache_queries",
    "vllm.prefix_cache.hits": "prefix_cache_hits",
    "vllm.prompt_tokens": "num_prompt_tokens",
    "vllm.generation_tokens": "num_generation_tokens",
    "vllm.preemptions": "num_preempted_reqs",
}
#: Attribute of a request's span (OpenTelemetry's names for generative AI, where it has one) -> column.
ATTRIBUTES = {
    "gen_ai.usage.input_tokens": "num_prompt_tokens",
    "gen_ai.usage.output_tokens": "num_generation_tokens",
    "kvhook.cached_tokens": "num_cached_tokens",
    "kvhook.preemptions": "num_preemptions",
}


def send(trace: kvhook.Trace, exporter: SpanExporter, reader: MetricReader, *, at_once: bool = False) -> None:
    """Spans of a run's requests go to the exporter, its counters to the reader."""
    meta = trace.meta
    about = Resource.create({"service.name": "vllm", "vllm.version": meta["vllm"], "kvhook.trace": trace.name})
    tracers = TracerProvider(resource=about)
    tracers.add_span_processor((SimpleSpanProcessor if at_once else BatchSpanProcessor)(exporter))
    tracer = tracers.get_tracer("kvhook", kvhook.__version__)
    # spans are on the wall clock, steps on the monotonic one: the trace says both for one moment
    shift = int(meta["realtime_ns"] - meta["monotonic_ns"])

    def nanoseconds(seconds: float) -> int:
        return round(seconds * 1e9) + shift

    lives = timeline(trace.steps(columns=["engine", "step", "t_end_ns"]), trace.requests())
    for row in lives.requests:
        # a NaN is not equal to itself: a time that is not known
        moments = [(name, float(row[name])) for name in ("arrived", "scheduled", "first_token", "ended")]
        known = [(name, at) for name, at in moments if at == at]
        attributes: dict[str, Any] = {name: int(row[column]) for name, column in ATTRIBUTES.items() if row[column] >= 0}
        attributes |= {
            "gen_ai.response.finish_reasons": [str(row["finish_reason"])],
            "kvhook.engine": int(row["engine"]),
        }
        span = tracer.start_span("request", start_time=nanoseconds(known[0][1]), attributes=attributes)
        phases = {"arrived": "queued", "scheduled": "prefill", "first_token": "decode"}
        for (name, at), (_, until) in pairwise(known):
            tracer.start_span(phases[name], set_span_in_context(span), start_time=nanoseconds(at)).end(
                nanoseconds(until)
            )
        span.end(nanoseconds(known[-1][1]))
    tracers.shutdown()

    meters = MeterProvider([reader], about, shutdown_on_exit=False)
    meter = meters.get_meter("kvhook", kvhook.__version__)
    for engine in meta["engines"]:
        steps = trace.steps(engine["engine"])
        for name, column in COUNTERS.items():
            if column in (steps.dtype.names or ()):  # not every vLLM has every column
                meter.create_counter(name).add(int(steps[column].sum()), {"kvhook.engine": engine["engine"]})
    meters.force_flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", help="a recorded run: run.kvh")
    args = parser.parse_args()
    if os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        periodic = PeriodicExportingMetricReader(OTLPMetricExporter())
        send(kvhook.open(args.trace), OTLPSpanExporter(), periodic)
        periodic.shutdown()
    else:
        memory, reader = InMemorySpanExporter(), InMemoryMetricReader()
        send(kvhook.open(args.trace), memory, reader, at_once=True)
        spans = memory.get_finished_spans()
        print(f"{sum(span.name == 'request' for span in spans)} requests, {len(spans)} spans")
        for metric in reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics:
            print(metric.name, sum(point.value for point in metric.data.data_points))
