"""Other tools wrap what kvhook wraps. Whoever comes and goes in whatever order, each does its own and no more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import kvhook
from kvhook.recording.installation import current_session
from tests.faults.tools import NAMES_OF_ORDERS, ORDERS, TOOLS, Tool, Tracer, Wraps
from tests.standin import fake_vllm, step_stats

pytestmark = pytest.mark.usefixtures("fresh")

OUTPUT = ["output of the step"]


def steps_of_a_new_engine(vllm: Any, count: int = 2) -> int:
    """Runs an engine; gives how many steps of it kvhook has recorded."""
    session = current_session()
    before = len(session.steps()) if session is not None else 0
    engine = vllm.engine()
    engine.plan += [step_stats(generated=1) for _ in range(count)]
    assert [engine.step() for _ in range(count)] == [OUTPUT] * count
    return len(session.steps()) - before if session is not None else 0


@pytest.mark.parametrize("order", ORDERS, ids=NAMES_OF_ORDERS)
@pytest.mark.parametrize("make", TOOLS, ids=[tool.__name__ for tool in TOOLS])
def test_in_every_order_each_sees_every_step_once_while_it_is_there(order: tuple[str, ...], make: Callable[[], Tool]):
    with fake_vllm() as vllm:
        tool, installed = make(), False
        original = vllm.originals()["LLMEngine.step"]
        for what in order:
            if what == "kvhook comes":
                kvhook.install(ring_slots=64, core="off")
                installed = True
            elif what == "kvhook goes":
                kvhook.uninstall()
                installed = False
            elif what == "tool comes":
                tool.come()
            else:
                tool.go()
            before = tool.calls
            assert steps_of_a_new_engine(vllm) == (2 if installed else 0), what
            # a tracer that takes out "what is there" may take out kvhook's in place of its own
            if tool.there or not isinstance(tool, Tracer):
                assert tool.calls - before == (2 if tool.there else 0), what
        # afterwards kvhook can come again, and records each step once
        with kvhook.install(ring_slots=64, core="off") as session:
            assert steps_of_a_new_engine(vllm) == 2
            assert session.faults == {}
        if not isinstance(tool, Tracer) and order[0].startswith("tool") == order[-1].startswith("tool"):
            assert vllm.originals()["LLMEngine.step"] is original, "whoever came first went last"


@pytest.mark.parametrize("make", TOOLS, ids=[tool.__name__ for tool in TOOLS])
def test_a_tool_below_ours_that_goes_takes_nothing_of_kvhooks_with_it(make: Callable[[], Tool], caplog: Any):
    with fake_vllm() as vllm:
        tool = make()
        tool.come()
        with kvhook.install(ring_slots=64, core="off") as session:
            assert steps_of_a_new_engine(vllm) == 2
            tool.go()
            assert steps_of_a_new_engine(vllm) == 2
            assert session.steps()["t_end_ns"].tolist() != session.steps()["t_start_ns"].tolist()
    said = [r.getMessage() for r in caplog.records if "as it was before kvhook.install()" in r.getMessage()]
    # a tracer takes out what is there only if it was made by the same library, and the extension's was not
    assert len(said) == 1 or (make is Tracer and not said)
    assert all("LLMEngine.step" in text for text in said)


@pytest.mark.parametrize("make", TOOLS, ids=[tool.__name__ for tool in TOOLS])
def test_the_constructor_may_be_wrapped_too(make: Callable[[str], Tool]):
    with fake_vllm() as vllm:
        tool = make("__init__")
        tool.come()
        with kvhook.install(ring_slots=64, core="off") as session:
            assert steps_of_a_new_engine(vllm) == 2
            assert session.faults == {}
        assert tool.calls == 1
        tool.go()
        steps_of_a_new_engine(vllm)
        assert tool.calls == 1


def test_ten_sessions_below_and_over_a_wrapper_record_each_step_once():
    """A wrapper of an earlier session that somebody still calls does nothing."""
    with fake_vllm() as vllm:
        tools = []
        for _ in range(10):
            with kvhook.install(ring_slots=64, core="off"):
                tools.append(Wraps())
                tools[-1].come()
                assert steps_of_a_new_engine(vllm) == 2
        assert [tool.calls for tool in tools] == [2 * n for n in range(10, 0, -1)]


def test_a_users_engine_class_that_calls_vllms_step_is_recorded_with_its_times():
    with fake_vllm() as vllm:
        base: Any = Tool().engine_class()

        class Mine(base):  # type: ignore[misc]
            def step(self) -> Any:
                return [*super().step(), "and more"]

        with kvhook.install(ring_slots=64, core="off") as session:
            engine = vllm.engine()
            mine = Mine(engine.vllm_config, object, log_stats=False)
            mine.plan += [step_stats(generated=3), step_stats(generated=4)]
            assert mine.step() == mine.step() == [*OUTPUT, "and more"]
            steps = session.steps()
            assert steps["num_generation_tokens"].tolist() == [3, 4]
            assert (steps["t_end_ns"] > steps["t_start_ns"]).all()
            assert session.health().ok


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_users_stat_logger_sees_each_step_once(when: str):
    """A subclass of vLLM's logger whose ``record`` is the user's, on a manager that the user made."""
    with fake_vllm() as vllm:
        import vllm.v1.metrics.loggers as loggers  # type: ignore[import-not-found, unused-ignore]

        seen: list[Any] = []

        class Mine(loggers.PrometheusStatLogger):  # type: ignore[misc, name-defined, unused-ignore]
            def __init__(self) -> None: ...

            def record(self, scheduler_stats: Any, *args: Any, **kwargs: Any) -> None:
                seen.append(scheduler_stats)

        if when == "after":
            kvhook.install(ring_slots=64, core="off")
        engine = vllm.engine(log_stats=True)
        engine.logger_manager.stat_loggers.append(Mine())
        session = kvhook.install(ring_slots=64, core="off")
        if when == "before":
            kvhook.attach(engine)
        engine.plan += [step_stats(generated=1), step_stats(generated=1)]
        engine.step()
        engine.step()
        assert len(session.steps()) == len(seen) == 2
        kvhook.uninstall()
        engine.plan.append(step_stats(generated=1))
        engine.step()
        assert len(seen) == 3
