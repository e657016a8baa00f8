"""ddtrace and openlit active beside kvhook, in both orders: each sees every request, and the tokens are the same."""

from __future__ import annotations

from pathlib import Path

import pytest

import kvhook
from tests.frameworks.conftest import Run
from tests.recipes import FRAMEWORKS, recipe

pytest.importorskip("ddtrace")
pytest.importorskip("openlit")

#: Both keep their spans in memory here: nothing is sent.
MEMORY = """
from opentelemetry import trace as _otel
from opentelemetry.sdk.trace import TracerProvider as _Provider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor as _Simple
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter as _Memory

_spans, _provider = _Memory(), _Provider()
_provider.add_span_processor(_Simple(_spans))
_otel.set_tracer_provider(_provider)

from ddtrace.trace import TraceFilter as _Filter, tracer as _tracer

_dd = []

class _Keep(_Filter):
    def process_trace(self, trace):
        _dd.extend(trace)
        return None

_tracer.configure(trace_processors=[_Keep()])
"""
WORK = """
from vllm import LLM, SamplingParams

llm = LLM(model="facebook/opt-125m", enforce_eager=True)
params = SamplingParams(max_tokens=9, temperature=0, ignore_eos=True)
outputs = llm.generate([f"Question {n}" for n in range(5)], params)
_tracer.flush()
"""
VALUE = """{
    "tokens": [list(o.outputs[0].token_ids) for o in outputs],
    "prompts": sum(len(o.prompt_token_ids) for o in outputs),
    "ddtrace": len([s for s in _dd if s.name.startswith("vllm")]),
    "openlit": len(_spans.get_finished_spans()),
    "faults": session.faults,
    "steps": int(session.steps()["num_generation_tokens"].sum()),
    "requests": session.requests()["num_generation_tokens"].tolist(),
    "timed": bool((session.steps()["t_end_ns"] > session.steps()["t_start_ns"]).all()),
}"""


@pytest.mark.parametrize("first", ["tracers", "kvhook"])
def test_all_three_see_every_request(first: str, project: Path, run_program: Run):
    lines = recipe("Beside ddtrace and openlit", FRAMEWORKS).splitlines()
    imports = [line for line in lines if line.startswith("import")]
    tracers = [line for line in lines if line.startswith(("ddtrace.", "openlit."))]
    ours = [line for line in lines if line.startswith("session")]
    assert len(imports) + len(tracers) + len(ours) == len([line for line in lines if line])
    calls = [*tracers, *ours] if first == "tracers" else [*ours, *tracers]
    told = run_program("\n".join([MEMORY, *imports, *calls, WORK]), VALUE)
    assert told["faults"] == {}
    assert told["steps"] == 5 * 9
    assert told["requests"] == [9] * 5
    assert told["timed"]
    assert told["ddtrace"] == 5, "a span for each request"
    assert told["openlit"] >= 1
    trace = kvhook.open(project / "traced.kvh")
    assert trace.steps()["num_prompt_tokens"].sum() == told["prompts"]
    assert trace.meta["records_lost"] == 0
