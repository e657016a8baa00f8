"""Engines in which somebody's part takes the place of vLLM's after the engine was made: what came back is recorded.

The truth is the outputs, what is counted around the scheduler, and the functions that the user had put there.
"""

from __future__ import annotations

import copy
import gc
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

import kvhook
from tests.engine import vllm_here
from tests.engine.conftest import MakeLLM

pytestmark = [
    pytest.mark.usefixtures("nothing_installed"),
    pytest.mark.skipif(not vllm_here.since(0, 28), reason="the parts have the names of 0.28 and later"),
]
PROMPTS = [list(range(2 + n, 102 + n)) for n in range(4)]
TOKENS = 5


class Client:
    """Takes the outputs from the engine core itself; otherwise it is vLLM's client."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def get_output(self) -> Any:
        return type(self.client).get_output(self.client)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)


def params() -> Any:
    from vllm import SamplingParams  # type: ignore[import-not-found, unused-ignore]

    return SamplingParams(temperature=0, ignore_eos=True, max_tokens=TOKENS)


def drive(engine: Any) -> tuple[int, list[Any]]:
    """Calls of step, and the outputs that finished."""
    for number, prompt in enumerate(PROMPTS):
        engine.add_request(str(number), {"prompt_token_ids": prompt}, params())
    done, calls = [], 0
    while engine.has_unfinished_requests():
        done += [output for output in engine.step() if output.finished]
        calls += 1
    return calls, done


def same(session: kvhook.Session, calls: int, done: list[Any]) -> None:
    """What was recorded is what came back."""
    steps = session.steps()
    assert len(steps) == len(session.core_steps()) == calls
    assert steps["num_added_reqs"].sum() == steps["num_finished_reqs"].sum() == len(done) == len(PROMPTS)
    assert steps["num_generation_tokens"].sum() == sum(len(output.outputs[0].token_ids) for output in done)
    assert steps["num_prompt_tokens"].sum() == sum(len(output.prompt_token_ids) for output in done)
    assert session.faults == {}
    assert not [one for one in session.summary().accounts if not one.ok]


@pytest.mark.parametrize("stats", [False, True], ids=["a processor without stats", "a processor with stats"])
@pytest.mark.parametrize("level", ["full", "light"])
def test_a_subclass_puts_in_an_output_processor_of_its_own(
    level: str, stats: bool, make_llm: MakeLLM, model: str, caplog: pytest.LogCaptureFixture
):
    from vllm import EngineArgs  # type: ignore[import-not-found, unused-ignore]
    from vllm.v1.engine.llm_engine import LLMEngine  # type: ignore[import-not-found, unused-ignore]
    from vllm.v1.engine.output_processor import OutputProcessor  # type: ignore[import-not-found, unused-ignore]

    class Engine(LLMEngine):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made: Any = self
            tokenizer, log_stats = made.output_processor.tokenizer, made.log_stats if stats else False
            made.output_processor = OutputProcessor(tokenizer, log_stats=log_stats)

    session = kvhook.install(level=level)
    options = {name: value for name, value in vllm_here.options().items() if name != "use_tqdm_on_load"}
    vllm_here.collect_engines()
    engine = Engine.from_engine_args(EngineArgs(model=model, **options, disable_log_stats=True))
    same(session, *drive(engine))
    assert "It is not recorded" not in caplog.text
    kvhook.uninstall()
    calls, done = drive(engine)
    assert (calls, len(done)) == (len(session.steps()), len(PROMPTS))


@pytest.mark.parametrize("stats", [False, True], ids=["stats off", "stats on"])
@pytest.mark.parametrize("level", ["full", "light"])
def test_a_subclass_puts_in_a_client_of_its_own(level: str, stats: bool, make_llm: MakeLLM, model: str):
    from vllm import EngineArgs  # type: ignore[import-not-found, unused-ignore]
    from vllm.v1.engine.llm_engine import LLMEngine  # type: ignore[import-not-found, unused-ignore]

    class Engine(LLMEngine):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made: Any = self
            made.engine_core = Client(made.engine_core)

    session = kvhook.install(level=level)
    options = {name: value for name, value in vllm_here.options().items() if name != "use_tqdm_on_load"}
    vllm_here.collect_engines()
    engine = Engine.from_engine_args(EngineArgs(model=model, **options, disable_log_stats=not stats))
    same(session, *drive(engine))
    assert session.steps()["has_scheduler_stats"].all()
    kvhook.uninstall()
    calls, done = drive(engine)
    assert (calls, len(done)) == (len(session.steps()), len(PROMPTS))


def test_an_engine_is_left_as_it_was_where_no_request_came_to_a_processor_of_its_own(make_llm: MakeLLM):
    from vllm.v1.engine.output_processor import OutputProcessor  # type: ignore[import-not-found, unused-ignore]

    kvhook.install()
    engine = make_llm().llm_engine

    def exchange(self: Any) -> None:  # kvhook goes by who makes the processor
        self.output_processor = OutputProcessor(self.output_processor.tokenizer, log_stats=False)

    exchange(engine)
    assert "add_request" in vars(engine)
    kvhook.uninstall()
    assert "add_request" not in vars(engine)
    assert drive(engine)[0]


@pytest.mark.parametrize("part", ["processor", "client"])
@pytest.mark.parametrize("stats", [False, True], ids=["stats off", "stats on"])
@pytest.mark.parametrize("level", ["full", "light"])
def test_a_part_is_exchanged_between_two_runs(level: str, stats: bool, part: str, make_llm: MakeLLM):
    from vllm.v1.engine.output_processor import OutputProcessor  # type: ignore[import-not-found, unused-ignore]

    session = kvhook.install(level=level)
    engine = make_llm(disable_log_stats=not stats).llm_engine
    first, done = drive(engine)
    if part == "client":
        engine.engine_core = Client(engine.engine_core)
    else:  # as it was made: kvhook turned its stats on, for itself alone
        engine.output_processor = OutputProcessor(engine.output_processor.tokenizer, log_stats=stats)
    second, more = drive(engine)
    steps = session.steps()
    assert len(steps) == len(session.core_steps()) == first + second
    assert steps["num_added_reqs"].sum() == steps["num_finished_reqs"].sum() == 2 * len(PROMPTS)
    every = [*done, *more]
    assert steps["num_generation_tokens"].sum() == sum(len(one.outputs[0].token_ids) for one in every)
    assert steps["num_prompt_tokens"].sum() == sum(len(one.prompt_token_ids) for one in every)
    assert steps["has_scheduler_stats"].all()
    assert session.faults == {}
    assert not [one for one in session.summary().accounts if not one.ok]


@pytest.mark.parametrize("level", ["full", "light"])
def test_copies_work_on_after_uninstall(level: str, make_llm: MakeLLM):
    """vLLM's step fails where an engine makes stats and its output processor gives requests no clocks."""
    kvhook.install(level=level)
    engine = make_llm().llm_engine
    first, _ = drive(engine)
    twin, never_driven = copy.copy(engine), copy.copy(engine)
    drive(twin)
    kvhook.uninstall()
    for each in (engine, twin, never_driven):
        calls, done = drive(each)
        assert (calls, len(done)) == (first, len(PROMPTS))
        assert not any(one.metrics for one in done)


def flag(engine: Any) -> None:
    engine.log_stats = False


def manager(engine: Any) -> None:
    engine.logger_manager = None


@pytest.mark.parametrize("turn_off", [flag, manager])
def test_the_stats_of_the_front_end_are_turned_off_after_the_engine_was_made(
    turn_off: Callable[[Any], None], make_llm: MakeLLM, caplog: pytest.LogCaptureFixture
):
    session = kvhook.install()
    engine = make_llm().llm_engine
    turn_off(engine)
    same(session, *drive(engine))
    assert "were turned off, or their logger taken away" in caplog.text


@pytest.mark.parametrize("turn_off", [flag, manager])
@pytest.mark.parametrize("stats", [False, True], ids=["stats off", "stats on"])
def test_the_stats_of_the_front_end_are_turned_off_between_two_runs(
    turn_off: Callable[[Any], None], stats: bool, make_llm: MakeLLM, caplog: pytest.LogCaptureFixture
):
    session = kvhook.install()
    engine = make_llm(disable_log_stats=not stats).llm_engine
    calls, _ = drive(engine)
    turn_off(engine)
    more, done = drive(engine)
    steps = session.steps()
    assert len(steps) == calls + more
    # what the first step without them gave is over when it shows: it is not known, and that is said
    after = steps[calls + 1 :]
    assert after["num_generation_tokens"].sum() == sum(len(one.outputs[0].token_ids) for one in done) - len(done)
    assert after["num_finished_reqs"].sum() == len(done)
    assert "were turned off, or their logger taken away" in caplog.text
    assert "came that nobody counted" in caplog.text
    assert session.summary().num_generation_tokens is None
    assert session.faults == {}


def test_a_copy_of_an_engine_is_recorded_with_the_engine(make_llm: MakeLLM, caplog: pytest.LogCaptureFixture):
    session = kvhook.install()
    engine = make_llm().llm_engine
    twin = copy.copy(engine)
    first, done = drive(engine)
    of_twin, of_twin_done = drive(twin)
    again, done_again = drive(engine)
    steps = session.steps()
    assert len(steps) == len(session.core_steps()) == first + of_twin + again
    assert set(steps["engine"]) == {0}
    assert (steps["t_end_ns"] > steps["t_start_ns"]).all()
    every = [*done, *of_twin_done, *done_again]
    assert steps["num_generation_tokens"].sum() == sum(len(one.outputs[0].token_ids) for one in every)
    assert session.faults == {}
    assert not [one for one in session.summary().accounts if not one.ok]
    assert "not driven by vLLM's own" not in caplog.text


@pytest.mark.parametrize("stats", [False, True], ids=["stats off", "stats on"])
@pytest.mark.parametrize("level", ["full", "light"])
def test_a_copy_of_an_engine_that_is_gone_is_recorded_and_that_is_said(
    level: str, stats: bool, make_llm: MakeLLM, caplog: pytest.LogCaptureFixture
):
    session = kvhook.install(level=level)
    llm = make_llm(disable_log_stats=not stats)
    first, done = drive(llm.llm_engine)
    twin = copy.copy(llm.llm_engine)
    del llm.llm_engine
    gc.collect()
    more, of_twin_done = drive(twin)
    steps = session.steps()
    assert len(steps) == len(session.core_steps()) == first + more
    every = [*done, *of_twin_done]
    assert steps["num_generation_tokens"].sum() == sum(len(one.outputs[0].token_ids) for one in every)
    assert steps["num_prompt_tokens"].sum() == sum(len(one.prompt_token_ids) for one in every)
    assert "did not see it being made" in caplog.text
    assert session.faults == {}
    assert not [one for one in session.summary().accounts if not one.ok]
    kvhook.uninstall()
    assert drive(twin)[0] == more


def counting(function: Callable[..., Any], name: str, calls: Counter[str]) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        return function(*args, **kwargs)

    return counted


def test_the_users_own_functions_in_an_engine_are_there_again_afterwards(make_llm: MakeLLM):
    engine = make_llm(disable_log_stats=False).llm_engine
    scheduler, processor = engine.engine_core.engine_core.scheduler, engine.output_processor
    calls = Counter[str]()
    theirs = []
    for owner, name in (
        (engine.engine_core, "get_output"),
        (scheduler, "schedule"),
        (scheduler, "update_from_output"),
        (processor, "process_outputs"),
        (processor, "add_request"),
    ):
        theirs.append((owner, name, counting(getattr(owner, name), name, calls)))
        setattr(*theirs[-1])
    drive(engine)
    before = dict(calls)
    kvhook.attach(engine)
    drive(engine)
    kvhook.uninstall()
    assert calls == {name: 2 * count for name, count in before.items()}
    assert [name for owner, name, function in theirs if vars(owner).get(name) is not function] == []
    drive(engine)
    assert calls == {name: 3 * count for name, count in before.items()}


def test_the_core_is_recorded_further_when_the_front_end_goes_down_a_level(make_llm: MakeLLM):
    session = kvhook.install(max_overhead=1e-9)
    engine = make_llm().llm_engine
    calls = 0
    while not len(session.steps()) or not session.steps()["level"].any():
        calls += drive(engine)[0]
        assert calls < 20_000, "it does not go down a level"
    calls += drive(engine)[0]
    assert len(session.core_steps()) == len(session.steps()) == calls


def test_a_tool_that_puts_back_vllms_init_is_named_and_the_next_engine_is_recorded(
    make_llm: MakeLLM, caplog: pytest.LogCaptureFixture
):
    from vllm.v1.engine.llm_engine import LLMEngine  # type: ignore[import-not-found, unused-ignore]

    with pytest.MonkeyPatch.context() as tool:
        original = LLMEngine.__init__
        tool.setattr(LLMEngine, "__init__", lambda self, *args, **kwargs: original(self, *args, **kwargs))
        session = kvhook.install()
    drive(make_llm().llm_engine)
    assert len(session.steps()) == 0
    (warning,) = (each.getMessage() for each in caplog.records if "somebody has put back what was there" in each.msg)
    assert "LLMEngine in vllm.v1.engine.llm_engine" in warning
    assert "neither vLLM's LLMEngine" not in caplog.text
    calls, done = drive(make_llm().llm_engine)
    assert len(session.steps()) == calls
    assert session.steps()["num_generation_tokens"].sum() == sum(len(output.outputs[0].token_ids) for output in done)
