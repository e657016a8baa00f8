"""Whatever goes wrong at a seam of the front end, the engine gives what it gives without kvhook.

The seams are not listed by hand where there is a table of them: attributes come from the adapters' tables, functions
from `StepFunctions`, patched names from what `kvhook.install` patches.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import types
from pathlib import Path
from typing import Any

import pytest

import kvhook
from kvhook.adapters.columns import ColumnPlan
from kvhook.adapters.config import engine_facts
from kvhook.adapters.step_functions import StepFunctions
from kvhook.adapters.table import attributes
from kvhook.adapters.v1 import V1
from kvhook.hooks import own_step, requests, wrappers
from kvhook.hooks.registry import registry
from kvhook.hooks.wrappers import ROLES
from kvhook.recording import notebook, owner, spool
from kvhook.recording.recorder import Recorder
from kvhook.ring import writer
from tests.contracts.behaviour import ENGINE, make_engine
from tests.contracts.core import Prompt, Said, Sent, add
from tests.contracts.core_engines import engines_of
from tests.contracts.loader import stubs
from tests.faults.odd import BEHAVIOURS, CONTAINED, PASSED_ON, VALUES, Odd, Quitting, odd_function
from tests.standin import fake_vllm, step_stats

pytestmark = pytest.mark.usefixtures("fresh")

#: All combinations, where there is time; a part of them otherwise, in which each attribute and each behaviour is.
ALL = bool(os.environ.get("KVHOOK_ALL_FAULTS"))
OUTPUT = ["output of the step"]


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Any:
    """The warnings of kvhook's so far."""
    return lambda: [r.getMessage() for r in caplog.records if r.name == "kvhook" and r.levelno >= logging.WARNING]


def readable(session: Any) -> Any:
    """Everything that reads the session reads it; gives its health."""
    health = session.health()
    str(session.summary())
    str(health)
    health.as_dict()
    session.windows(3)
    session.steps()
    session.requests()
    return health


# Attributes of vLLM's objects


def attributes_read() -> list[tuple[str, str]]:
    """(source, attribute) of everything that the adapter of this release reads."""
    with fake_vllm() as vllm:
        engine = vllm.engine()
        plan = ColumnPlan(V1, engine_facts(V1, engine) | {"finished_hook": True})
    read: set[tuple[str, str]] = set()
    expressions = (*plan.steps.values(), *plan.requests.values(), *plan.lists.values(), plan.finished)
    for expression in map(str, expressions):
        read |= attributes(expression)
    for source in V1.sources:
        if source.name in {name for name, _ in read}:
            read |= attributes(source.expression) if source.expression else set()
    return sorted(read)


#: Where the objects hang: source -> the way to it from what a step hands over (0: SchedulerStats, 1: IterationStats).
WAYS: dict[str, tuple[int, tuple[str, ...]]] = {
    "sched": (0, ()),
    "prefix": (0, ("prefix_cache_stats",)),
    "iteration": (1, ()),
    "prompt": (1, ("prompt_token_stats",)),
    "request": (1, ("finished_requests", "0")),
}


def odd_stats(source: str, attribute: str, behaviour: str) -> tuple[Any, Any, Any]:
    """The stats of a step, of which one attribute is odd."""
    request = {"finish_reason": 1, "num_prompt_tokens": 9, "request_id": "7"}
    stats = list(step_stats(generated=2, ttft=[0.1, 0.2, 0.3], itl=[0.01, 0.02, 0.04], finished=[request]))
    at, way = WAYS[source]
    if not way:
        stats[at] = Odd(stats[at], attribute, behaviour)
    elif way[0] == "finished_requests":
        stats[at].finished_requests = [Odd(stats[at].finished_requests[0], attribute, behaviour)]
    else:
        setattr(stats[at], way[0], Odd(getattr(stats[at], way[0]), attribute, behaviour))
    return tuple(stats)


READ = attributes_read()
CASES = [
    (source, attribute, behaviour)
    for number, (source, attribute) in enumerate(r for r in READ if r[0] in WAYS)
    for at, behaviour in enumerate(BEHAVIOURS)
    if ALL or (at + number) % 5 == 0
]


def test_the_table_has_the_attributes_that_are_made_odd():
    assert {source for source, _ in READ} >= set(WAYS)
    assert len({case[:2] for case in CASES}) > 30
    assert {case[2] for case in CASES} == set(BEHAVIOURS)


def test_whatever_an_attribute_is_the_engine_gives_its_outputs(warnings: Any):
    """One session, an engine for each case: each fails for itself, and the others go on."""
    failed = passed_on = 0
    with fake_vllm() as vllm, kvhook.install(ring_slots=64, core="off") as session:
        for source, attribute, behaviour in CASES:
            case = f"{source}.{attribute} {behaviour}"
            engine = vllm.engine()
            engine.plan += [step_stats(generated=1), odd_stats(source, attribute, behaviour), step_stats(generated=1)]
            assert engine.step() == OUTPUT
            if behaviour in PASSED_ON:
                raised = ""
                try:
                    assert engine.step() == OUTPUT, case  # not every attribute is read in every release
                except (KeyboardInterrupt, SystemExit) as error:
                    raised = type(error).__name__
                    passed_on += 1
                assert raised in ("", behaviour), case
            else:
                assert engine.step() == OUTPUT, case
            assert engine.step() == OUTPUT, case
            failed += id(engine) not in registry.steps
            del engine
        health = readable(session)
        steps = session.steps()
    assert failed > len(CASES) / 4
    assert passed_on > 5
    # each step before the odd one is there, and so is every step of an engine that did not fail
    assert len(steps) >= len(CASES) + 2 * (len(CASES) - failed - passed_on)
    (seam,) = health.seams
    assert (seam.where, seam.errors, seam.off) == ("recording a step", failed, True)
    assert not health.ok
    assert len([text for text in warnings() if "recording a step" in text]) == 1, "it is reported once"


@pytest.mark.parametrize("behaviour", VALUES)
def test_numbers_that_are_none_can_be_read_summed_up_and_exported(behaviour: str, fresh: Path):
    with fake_vllm() as vllm, kvhook.install(ring_slots=64, core="off", trace=fresh / "odd.kvh") as session:
        for source, attribute in (("sched", "num_running_reqs"), ("sched", "kv_cache_usage"), ("prefix", "queries")):
            engine = vllm.engine()
            engine.plan += [step_stats(), odd_stats(source, attribute, behaviour), step_stats()]
            assert [engine.step() for _ in range(3)] == [OUTPUT] * 3
        engine = vllm.engine()
        engine.plan.append(step_stats(ttft=[VALUES[behaviour]] * 3, itl=[0.1, VALUES[behaviour]]))
        assert engine.step() == OUTPUT
        readable(session)
        session.dump(fresh / "odd.jsonl")
    str(kvhook.open(fresh / "odd.kvh").summary())


# Functions of the step path

RELEASE = "0.32.0"
SYNC = f"{ENGINE}:LLMEngine"


SCRIPT = (
    Sent((Said("a"), Said("b"), Said("c")), running=3, looked_up=30, found=0),
    Sent((Said("a", tokens=2), Said("b")), running=3),
    Sent((), running=3),
    Sent((Said("a", finished=True), Said("c")), running=2),
    Sent((Said("c", finished=True),), running=0),
)


def play(engine: Any) -> list[Any]:
    """What the engine gives, request by request."""
    for name in "abc":
        add(engine, name, Prompt(computed=10))
    given = []
    for number, sent in enumerate(SCRIPT):
        engine.engine_core.plan.append(sent)
        given.append(repr(engine.step()))
        if number == 2:
            engine.abort_request(["b"])
    return [given, sorted(engine.output_processor.request_states), engine.engine_core.aborted]


@functools.cache
def undisturbed(log_stats: bool) -> list[Any]:
    kvhook.uninstall()
    with stubs(engines_of(RELEASE)):
        return play(make_engine(SYNC, log_stats=log_stats))


#: `record` only assigns what it is given, so that nothing in it can fail; vLLM calls it directly.
FUNCTIONS = [name for name in StepFunctions._fields if name not in ("record", "left")]


@pytest.mark.parametrize("level", ["full", "light"])
@pytest.mark.parametrize("log_stats", [False, True], ids=["off", "on"])
def test_whatever_a_function_of_the_step_path_does_the_engine_gives_its_outputs(
    level: str, log_stats: bool, both_paths: str, monkeypatch: pytest.MonkeyPatch
):
    make = Recorder._bind
    expected = undisturbed(log_stats)
    cases = list(itertools.product(FUNCTIONS, ("text", "blocks", *CONTAINED)))
    # with three choices of a parameter each, every case comes in one of the eight runs
    first = 4 * (level == "light") + 2 * log_stats + (both_paths == "c")
    for function, behaviour in cases if ALL else cases[first::8] + cases[(first + 3) % 8 :: 16]:

        def bind(self: Any, *args: Any, function: str = function, behaviour: str = behaviour) -> StepFunctions:
            made = make(self, *args)
            return made._replace(**{function: odd_function(getattr(made, function), behaviour)})

        monkeypatch.setattr(Recorder, "_bind", bind)
        with stubs(engines_of(RELEASE)), kvhook.install(ring_slots=64, level=level, core="off") as session:
            engine = make_engine(SYNC, log_stats=log_stats)
            assert play(engine) == expected, (function, behaviour)
            health = readable(session)
        called = behaviour in CONTAINED and (function != "flush" or level == "light")
        if called and function != "flush":
            assert not health.ok, (function, behaviour)
            assert all(seam.off for seam in health.seams), (function, behaviour, health.seams)
            assert {seam.errors for seam in health.seams} == {1}, (function, behaviour, health.seams)


@pytest.mark.parametrize("behaviour", PASSED_ON)
@pytest.mark.parametrize("function", ["publish", "take", "add"])
def test_ctrl_c_and_sys_exit_go_on_to_the_user(
    function: str, behaviour: str, both_paths: str, monkeypatch: pytest.MonkeyPatch
):
    make = Recorder._bind

    def bind(self: Any, *args: Any) -> StepFunctions:
        made = make(self, *args)
        return made._replace(**{function: odd_function(getattr(made, function), behaviour)})

    monkeypatch.setattr(Recorder, "_bind", bind)
    with stubs(engines_of(RELEASE)), kvhook.install(ring_slots=64, core="off") as session:
        engine = make_engine(SYNC, log_stats=False)
        with pytest.raises(BaseException, match=r"^$") as caught:
            play(engine)
        assert type(caught.value).__name__ == behaviour
        assert session.faults == {}, "it is no failure of kvhook's"
    monkeypatch.undo()


# What is called when an engine is made, and where its requests come and go


#: Role of a patched name, or what a tap does -> what kvhook calls there, and where that is found.
INJECTIONS: list[tuple[str, Any, str]] = [
    ("engine_init", wrappers, "watch"),
    ("engine_init", type(registry), "adapter_of"),
    ("engine_init", wrappers, "inspect"),
    ("core", wrappers, "inspect"),
    ("manager", wrappers, "quiet_manager"),
    ("note", notebook.Notebook, "label_request"),
    ("abort", requests, "aborted_v1"),
    ("counts", own_step, "Counts"),
    ("open", owner, "Recorder"),
    ("ring", writer.RingWriter, "_make_publish"),
    ("spool", spool.Spool, "add"),
]


@pytest.mark.parametrize(("role", "place", "name"), INJECTIONS, ids=[f"{i[0]}-{i[2]}" for i in INJECTIONS])
@pytest.mark.parametrize("level", ["full", "light"])
def test_an_engine_is_made_and_works_whatever_fails_around_it(role: str, place: Any, name: str, level: str):
    expected = undisturbed(False)
    for behaviour in CONTAINED if ALL else list(CONTAINED)[level == "light" :: 2]:
        with stubs(engines_of(RELEASE)), kvhook.install(ring_slots=64, level=level, core="off") as session:
            with pytest.MonkeyPatch.context() as patch:
                bad: Any = odd_function(lambda *_, **__: None, behaviour)
                patch.setattr(place, name, types.SimpleNamespace(signature=bad) if name == "inspect" else bad)
                engine = make_engine(SYNC, log_stats=False)
                assert play(engine) == expected, (name, behaviour)
            health = readable(session)
            if role in ("engine_init", "open", "ring", "spool"):
                assert not health.ok, (name, behaviour)


def test_every_patched_role_is_among_the_injections():
    hot = {"engine_step", "record", "stats", "finished"}  # their functions and attributes are made odd above
    simple = {"processor", "get_metrics"}  # they look at kvhook's own table only
    assert set(ROLES) - hot - simple == {role for role, _, _ in INJECTIONS} & set(ROLES)


def test_a_function_that_gives_labels_may_do_anything():
    expected = undisturbed(False)
    for behaviour in (
        (*CONTAINED, *VALUES, "blocks") if ALL else (*list(CONTAINED)[::2], "text", "list", "NaN", "bytes")
    ):
        label = odd_function(lambda request: "label", behaviour)
        with stubs(engines_of(RELEASE)), kvhook.install(ring_slots=64, core="off", labels=label) as session:
            assert play(make_engine(SYNC, log_stats=False)) == expected, behaviour
            health = readable(session)
        wrong = [(seam.where, seam.errors, seam.off) for seam in health.seams]
        assert wrong == ([("noting a request's label", 3, False)] if behaviour in CONTAINED else []), behaviour


def test_a_function_that_gives_labels_is_not_called_any_more_when_it_has_failed_a_hundred_times():
    calls = 0

    def label(request: str) -> str:
        nonlocal calls
        calls += 1
        raise Quitting

    with stubs(engines_of(RELEASE)), kvhook.install(ring_slots=64, core="off", labels=label) as session:
        engine = make_engine(SYNC, log_stats=False)
        for number in range(150):
            add(engine, str(number), Prompt(computed=10))
        (seam,) = session.health().seams
    assert (calls, seam.errors, seam.off) == (100, 100, True)
    assert "switched off" in str(seam)


# Reporting itself


def test_a_log_handler_that_raises_fails_no_engine():
    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise Quitting

    handler = Handler()
    logging.getLogger("kvhook").addHandler(handler)
    try:
        with fake_vllm() as vllm, kvhook.install(ring_slots=64, core="off") as session:
            engine = vllm.engine()
            engine.plan += [odd_stats("sched", "kv_cache_usage", "Exception"), step_stats()]
            assert [engine.step(), engine.step()] == [OUTPUT] * 2
            (seam,) = session.health().seams
            assert seam.first_error == "ValueError: injected"
    finally:
        logging.getLogger("kvhook").removeHandler(handler)


def test_what_failed_is_in_the_trace_and_doctor_tells_it(fresh: Path, capsys: pytest.CaptureFixture[str]):
    from kvhook.cli import main

    with fake_vllm() as vllm, kvhook.install(ring_slots=64, core="off", trace=fresh / "run.kvh") as session:
        engine = vllm.engine()
        engine.plan += [step_stats(), odd_stats("prefix", "hits", "Exception")]
        engine.step()
        engine.step()
        assert "NOT healthy" in str(session.health())
        assert "ValueError: injected" in str(session.health())
    assert kvhook.open(fresh / "run.kvh").meta["faults"] == {"recording a step": "ValueError: injected"}
    assert main(["doctor", str(fresh / "run.kvh")]) == 1
    assert "recording a step failed: ValueError: injected" in capsys.readouterr().out
    with fake_vllm() as vllm, kvhook.install(ring_slots=64, core="off", trace=fresh / "good.kvh") as session:
        engine = vllm.engine()
        engine.plan.append(step_stats())
        engine.step()
        assert session.health().ok
        assert str(session.health()) == "kvhook is healthy: 1 engine, 1 records, none lost"
    assert main(["doctor", str(fresh / "good.kvh")]) == 0
    assert "nothing went wrong" in capsys.readouterr().out
