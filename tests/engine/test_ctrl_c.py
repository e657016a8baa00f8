"""Ctrl-C in the middle of a real engine's step: it is the user's, and the engine goes on as it does without kvhook."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from inspect import signature
from typing import Any, NamedTuple

import pytest

import kvhook
from tests.engine import vllm_here
from tests.engine.conftest import MakeLLM
from tests.workloads import run, workload

pytestmark = pytest.mark.skipif(not vllm_here.since(0, 13), reason="the engine core's parts have the names of 0.13")

#: The step in which it comes.
AT = 4
#: Part of a step -> the object whose function the signal comes in, and its name.
PLACES: dict[str, Callable[[Any], tuple[Any, str]]] = {
    "schedule": lambda engine: (engine.engine_core.engine_core.scheduler, "schedule"),
    "model": lambda engine: (engine.engine_core.engine_core.model_executor, "execute_model"),
    "update": lambda engine: (engine.engine_core.engine_core.scheduler, "update_from_output"),
    "outputs": lambda engine: (engine.output_processor, "process_outputs"),
}


class Gone(NamedTuple):
    """What came of it."""

    #: steps that ended
    steps: int
    left_over: int
    tokens: list[list[int]]


@pytest.fixture(autouse=True)
def _minds_ctrl_c() -> Iterator[None]:
    """A program that a script starts in the background ignores SIGINT, and so do the tests there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted(llm: Any, place: str) -> Gone:
    """A batch that Ctrl-C ends, and another one after what was left of it was aborted."""
    engine, calls, ended = llm.llm_engine, 0, 0
    owner, name = PLACES[place](engine)
    function, step = getattr(owner, name), engine.step

    def signalled(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == AT:
            signal.raise_signal(signal.SIGINT)
        return function(*args, **kwargs)

    def counted() -> Any:
        nonlocal ended
        result = step()
        ended += 1
        return result

    setattr(owner, name, signalled)
    engine.step = counted
    with pytest.raises(KeyboardInterrupt):
        run(llm, workload()[:1])
    setattr(owner, name, function)
    left = list(engine.output_processor.request_states)
    # newer releases have names of their own for requests
    engine.abort_request(left, **{"internal": True} if "internal" in signature(engine.abort_request).parameters else {})
    outputs = run(llm, workload()[1:2])
    engine.step = step
    return Gone(ended, len(left), [list(one.outputs[0].token_ids) for one in outputs])


@pytest.mark.parametrize("place", list(PLACES))
def test_it_ends_the_call_and_the_next_one_is_recorded_in_full(make_llm: MakeLLM, place: str):
    bare = interrupted(make_llm(), place)
    with kvhook.install() as session:
        gone = interrupted(make_llm(), place)
        steps, lost = session.steps(), session.meta["records_lost"]
        health = session.health()
    assert gone == bare
    assert len(gone.tokens) == len(workload()[1].prompts)
    # the step that it came in may have its record, if all of its numbers were there already
    assert gone.steps <= len(steps) <= gone.steps + 1
    assert steps["step"].tolist() == list(range(len(steps)))
    last = steps[-(gone.steps - AT + 1) :]
    assert last["num_generation_tokens"].sum() == sum(map(len, gone.tokens))
    assert lost == 0
    assert health.ok, health
