"""Other people's code beside kvhook in a real engine: wrappers that come and go, stat loggers, dropped engines."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import wrapt

import kvhook
from tests.engine import vllm_here
from tests.engine.conftest import MakeLLM
from tests.faults.tools import NAMES_OF_ORDERS, ORDERS, TOOLS, Tool, Tracer
from tests.workloads import run, workload

PROMPT = list(range(2, 40))
NEW_TOKENS = 4


pytestmark = pytest.mark.usefixtures("nothing_installed")


# Wrappers of LLMEngine.step


class OpenTelemetry(Tracer):
    """A span of OpenTelemetry's own around each step, as its instrumentations make them."""

    def __init__(self) -> None:
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

        super().__init__()
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = provider.get_tracer("somebody")

    def put(self) -> None:
        def around(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
            with self.tracer.start_as_current_span("step"):
                self.calls += 1
                return wrapped(*args, **kwargs)

        wrapt.wrap_function_wrapper("vllm.v1.engine.llm_engine", "LLMEngine.step", around)


REAL_TOOLS: list[type[Tool]] = [*TOOLS, OpenTelemetry]


@pytest.fixture(scope="module")
def engine(make_llm: MakeLLM) -> Any:
    """One engine for all orders, its stats on, to which kvhook is attached each time."""
    kvhook.uninstall()
    return make_llm(disable_log_stats=False)


def generate(engine: Any, name: str) -> tuple[int, list[int]]:
    """A request, step by step: how many steps it took, and its tokens."""
    from vllm import SamplingParams  # type: ignore[import-not-found, unused-ignore]

    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=NEW_TOKENS)
    engine.add_request(name, {"prompt_token_ids": PROMPT}, params)
    steps, given = 0, list[int]()
    while engine.has_unfinished_requests():
        steps += 1
        for output in engine.step():
            given = list(output.outputs[0].token_ids)
    return steps, given


@pytest.mark.parametrize("order", ORDERS, ids=NAMES_OF_ORDERS)
@pytest.mark.parametrize("make", REAL_TOOLS, ids=[tool.__name__ for tool in REAL_TOOLS])
def test_in_every_order_each_sees_every_step_once_while_it_is_there(
    order: tuple[str, ...], make: type[Tool], engine: Any
):
    pytest.importorskip("opentelemetry.sdk") if make is OpenTelemetry else None
    tool = make()
    original = vars(tool.engine_class())["step"]
    _, expected = generate(engine.llm_engine, "bare")
    session: Any = None
    try:
        for number, what in enumerate(order):
            if what == "kvhook comes":
                kvhook.install(core="off")
                session = kvhook.attach(engine)
            elif what == "kvhook goes":
                kvhook.uninstall()
                session = None
            elif what == "tool comes":
                tool.come()
            else:
                tool.go()
            calls, recorded = tool.calls, 0 if session is None else len(session.steps())
            steps, tokens = generate(engine.llm_engine, str(number))
            assert tokens == expected
            if session is not None:
                assert len(session.steps()) - recorded == steps, what
                assert session.health().ok, str(session.health())
            # a tracer that takes out "what is there" may take out kvhook's in place of its own
            if tool.there or not isinstance(tool, Tracer):
                assert tool.calls - calls == (steps if tool.there else 0), what
        if isinstance(tool, OpenTelemetry):
            assert len(tool.exporter.get_finished_spans()) == tool.calls
    finally:
        kvhook.uninstall()
        tool.engine_class().step = original


# Stat loggers


def loggers() -> tuple[list[Any], list[Any]]:
    """A user's two stat loggers, and what they were given."""
    from vllm.v1.metrics.loggers import (  # type: ignore[import-not-found, unused-ignore]
        PrometheusStatLogger,
        StatLoggerBase,
    )

    seen: list[Any] = []

    class Mine(StatLoggerBase):  # type: ignore[misc, unused-ignore]
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None: ...

        def record(
            self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
        ) -> None:
            seen.append(("mine", iteration_stats.num_generation_tokens if iteration_stats else 0))

        def log_engine_initialized(self) -> None:
            seen.append(("begun", 0))

    class MyPrometheus(PrometheusStatLogger):  # type: ignore[misc, unused-ignore]
        def record(self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any) -> None:
            seen.append(("prometheus", iteration_stats.num_generation_tokens if iteration_stats else 0))
            super().record(scheduler_stats, iteration_stats, *args, **kwargs)

    return [Mine, MyPrometheus], seen


def engine_with(model: str, stat_loggers: list[Any], stats: bool) -> Any:
    """An engine that its user made with stat loggers."""
    from vllm.engine.arg_utils import EngineArgs  # type: ignore[import-not-found, unused-ignore]
    from vllm.v1.engine.llm_engine import LLMEngine  # type: ignore[import-not-found, unused-ignore]

    arguments = EngineArgs(model=model, disable_log_stats=not stats, **vllm_here.options())
    return LLMEngine.from_engine_args(arguments, stat_loggers=stat_loggers)


@pytest.mark.parametrize("stats", [True, False], ids=["stats_on", "stats_off"])
def test_a_users_stat_loggers_are_given_what_they_are_given_without_kvhook(
    stats: bool, make_llm: MakeLLM, model: str, engine: Any
):
    mine, bare = loggers()
    steps, tokens = generate(engine_with(model, mine, stats), "1")
    mine, seen = loggers()
    with kvhook.install() as session:
        recorded = engine_with(model, mine, stats)
        manager = recorded.logger_manager
        assert generate(recorded, "1") == (steps, tokens)
        assert seen == bare
        assert (len(seen) == 1 + 2 * steps) if stats else (seen == [])
        if stats:
            # PrometheusStatLogger is not made beside the user's, as vLLM has it
            assert [type(each).__name__ for each in manager.stat_loggers].count("PrometheusStatLogger") == 0
        assert len(session.steps()) == steps
        assert session.steps()["num_generation_tokens"].sum() == NEW_TOKENS
        assert session.health().ok
    before = len(seen)
    generate(recorded, "2")
    assert len(seen) - before == (2 * steps if stats else 0), "they go on when kvhook is gone"


# Engines that are dropped. After one of them is gone, the engine of the tests above can run no more.


def test_kvhook_keeps_no_engine_alive(make_llm: MakeLLM):
    session: Any = None
    for installed in (False, True):  # first without it: vLLM itself lets go of its engine
        if installed:
            session = kvhook.install(core="blocks", labels="/")
            session.on_step(lambda steps: None, every=0.01)
        llm = make_llm()
        run(llm, workload()[:2])
        core = llm.llm_engine.engine_core.engine_core
        there = [llm, llm.llm_engine, core, core.scheduler, core.scheduler.kv_cache_manager.block_pool]
        alive = [weakref.ref(each) for each in there]
        names = [type(each).__name__ for each in there]
        del llm, core, there
        vllm_here.collect_engines()
        assert [name for name, each in zip(names, alive, strict=True) if each() is not None] == [], installed
    assert len(session.steps()) > 0
    assert session.health().ok
