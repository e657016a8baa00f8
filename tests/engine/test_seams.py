"""Seams that fail inside a real engine: its outputs are those without kvhook, and the session tells what failed.

`tests/faults` makes every seam fail, on engines that are played. This is a sample of them: the front end, fields that
the adapter reads, the ring, the spool, the user's functions, the engine core. Each fails in the middle of a workload
with shared beginnings, preemptions, an emptied prefix cache and an aborted request.
"""

from __future__ import annotations

import errno
import itertools
import logging
import random
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

import kvhook
from kvhook import _step
from kvhook.adapters.step_functions import StepFunctions
from kvhook.core import process as core_process
from kvhook.core.lookups import Lookups
from kvhook.core.pool import PoolAccount
from kvhook.core.steps import StepAccount
from kvhook.core.writer import Writer
from kvhook.faults import LIMITS
from kvhook.hooks import schedule, wrappers
from kvhook.recording import notebook
from kvhook.recording.recorder import Recorder
from kvhook.ring.place import RING_SUFFIX
from kvhook.ring.reader import RingReader
from kvhook.ring.trace_file import TraceWriter
from kvhook.ring.writer import RingWriter
from tests.engine.conftest import MakeLLM
from tests.faults.odd import BEHAVIOURS, Odd
from tests.workloads import BLOCK_SIZE, Call, run, tokens

Patch = pytest.MonkeyPatch
Act = Callable[[Any], Any]

STEP = "recording a step"
COUNTING = "counting what a step gave"
CORE = "counting inside the engine core"


# The workload


def calls() -> list[Call]:
    """Hits, preemptions, and more than a hundred requests: a seam that fails with each request is switched off."""
    rng = random.Random(31)
    shared = tokens(rng, 3 * BLOCK_SIZE)
    return [
        Call([[*shared, 7]], {"max_tokens": 3}),
        Call([tokens(rng, rng.randrange(140, 156)) for _ in range(12)], {"max_tokens": 24}),
        Call([shared + tokens(rng, 5) for _ in range(90)], {"max_tokens": 1}),
    ]


def drive(llm: Any) -> list[Any]:
    """What the engine gives: tokens and reasons of all requests."""
    from vllm import SamplingParams  # type: ignore[import-not-found, unused-ignore]

    outputs = run(llm, calls())
    given: list[Any] = [(list(one.outputs[0].token_ids), one.outputs[0].finish_reason) for one in outputs]
    given.append(bool(llm.reset_prefix_cache()))
    engine, params = llm.llm_engine, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    for name in ("7001", "7002"):
        engine.add_request(name, {"prompt_token_ids": [5, 6, 7]}, params)
    for number in itertools.count():
        if not engine.has_unfinished_requests():
            return [*given, number]
        given.append([(one.request_id, list(one.outputs[0].token_ids)) for one in engine.step()])
        if number == 2:
            engine.abort_request(["7001"])
    return given


@pytest.fixture(scope="module")
def expected(make_llm: MakeLLM) -> list[Any]:
    """The same without kvhook."""
    kvhook.uninstall()
    llm = make_llm()
    scheduler, preempted = llm.llm_engine.engine_core.engine_core.scheduler, list[Any]()
    preempt = scheduler._preempt_request

    def noted(request: Any, *rest: Any, **more: Any) -> None:
        preempted.append(request)
        preempt(request, *rest, **more)

    scheduler._preempt_request = noted
    given = drive(llm)
    assert preempted
    return given


def full_disk(value: Any) -> Any:
    """As if there were no room."""
    raise OSError(errno.ENOSPC, "injected")


ACTS: dict[str, Act] = {**BEHAVIOURS, "OSError": full_disk}


def late(act: Act, after: int) -> Act:
    """The first calls go well."""
    calls = itertools.count()
    return lambda value: value if next(calls) < after else act(value)


# How a seam is made to fail: each function is given what is to happen


def result_of(owner: Any, name: str) -> Callable[[Patch, Act], None]:
    """The result of a function or method of kvhook's is odd, or it raises. What it does, it does."""

    def put(patch: Patch, act: Act) -> None:
        real = getattr(owner, name)
        patch.setattr(owner, name, lambda *args, **kwargs: act(real(*args, **kwargs)))

    return put


def instead_of(owner: Any, name: str) -> Callable[[Patch, Act], None]:
    """The same, and it does nothing any more from the first failure on."""

    def put(patch: Patch, act: Act) -> None:
        real = getattr(owner, name)

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            act(None)
            return real(*args, **kwargs)

        patch.setattr(owner, name, stand_in)

    return put


def step_function(name: str) -> Callable[[Patch, Act], None]:
    """One of the functions that record an engine."""

    def put(patch: Patch, act: Act) -> None:
        make = Recorder._bind

        def bind(self: Any, *args: Any) -> StepFunctions:
            made = make(self, *args)
            real = getattr(made, name)
            return made._replace(**{name: lambda *args, **kwargs: act(real(*args, **kwargs))})

        patch.setattr(Recorder, "_bind", bind)

    return put


def field(function: str, argument: int, *path: str) -> Callable[[Patch, Act], None]:
    """A field of vLLM's stats as kvhook reads it. vLLM reads its own objects."""

    def odd(value: Any, act: Act, at: int = 0) -> Any:
        if value is None:
            return None
        return Odd(value, path[at], act if at == len(path) - 1 else lambda inner: odd(inner, act, at + 1))

    def put(patch: Patch, act: Act) -> None:
        make = Recorder._bind

        def bind(self: Any, *args: Any) -> StepFunctions:
            made = make(self, *args)
            real = getattr(made, function)

            def changed(*args: Any, **kwargs: Any) -> Any:
                if len(args) > argument:
                    return real(*args[:argument], odd(args[argument], act), *args[argument + 1 :], **kwargs)
                name = ("scheduler_stats", "iteration_stats")[argument]
                return real(*args, **{**kwargs, name: odd(kwargs[name], act)})

            return made._replace(**{function: changed})

        patch.setattr(Recorder, "_bind", bind)

    return put


def ring_of_the_front_end(patch: Patch, act: Act) -> None:
    """What stores a record in the ring. The engine core's ring is another."""
    make = RingWriter._make_publish

    def act_on(store: Any) -> Any:
        return lambda n, record: act(store(n, record))

    def made(self: RingWriter) -> Any:
        store = make(self)
        return act_on(store) if self.path.name.endswith(RING_SUFFIX) else store

    patch.setattr(RingWriter, "_make_publish", made)


def count_of_free_blocks(patch: Patch, act: Act) -> None:
    """What is asked after each schedule."""
    make = schedule._free_blocks

    def made(*args: Any) -> Callable[[], int]:
        count = make(*args)
        return lambda: act(count())

    patch.setattr(schedule, "_free_blocks", made)


def core_read(name: str) -> Callable[[Patch, Act], None]:
    """What Python reads of the engine core."""

    def put(patch: Patch, act: Act) -> None:
        patch.setattr(_step, "native", None)
        read = vars(core_process)["read_core"]

        def read_core(scheduler: Any) -> Any:
            core: Any = read(scheduler)
            real = core.reads[name]
            core.reads[name] = lambda *args: act(real(*args))
            return core

        patch.setattr(core_process, "read_core", read_core)

    return put


def nothing(patch: Patch, act: Act) -> None:
    """It is the user's function that fails."""


class Seam(NamedTuple):
    """A seam, and how it fails."""

    name: str
    put: Callable[[Patch, Act], None]
    behaviour: str
    #: under which name the errors are counted; "" if it is nothing to complain of
    where: str
    #: so many calls go well
    after: int = 0
    level: str = "full"
    #: the user's function that fails: an argument of `kvhook.install`, or a method of the session
    user: str = ""
    core: str = "steps"

    @property
    def in_a_thread(self) -> bool:
        """Whether it is a thread of kvhook's that fails, which comes to it in its own time."""
        return self.where in ("a function of on_step", "writing the trace", "draining the ring")


SEAMS = [
    # the functions of the step path
    Seam("publish", step_function("publish"), "Exception", STEP, 20),
    Seam("publish-light", step_function("publish"), "MemoryError", STEP, 20, "light"),
    Seam("take", step_function("take"), "BaseException", COUNTING, 20),
    Seam("add", step_function("add"), "RecursionError", COUNTING, 5),
    Seam("abort", step_function("abort"), "Exception", COUNTING),
    # fields that the adapter reads
    Seam("usage-text", field("take", 0, "kv_cache_usage"), "text", STEP, 10),
    Seam("usage-nan", field("take", 0, "kv_cache_usage"), "NaN", STEP, 10),
    Seam("hits-huge", field("take", 0, "prefix_cache_stats", "hits"), "huge", STEP, 10),
    Seam("running-negative", field("take", 0, "num_running_reqs"), "negative", ""),
    Seam("generated-raises", field("record", 1, "num_generation_tokens"), "BaseException", STEP, 10),
    # what else is called while the engine works
    Seam("free-blocks", count_of_free_blocks, "Exception", "reading the free blocks of a schedule"),
    Seam("call", result_of(notebook.Notebook, "begin_call"), "Exception", "noting a call of LLM", 1),
    Seam("labels", nothing, "Exception", "noting a request's label", user="labels"),
    Seam("on_step", nothing, "Exception", "a function of on_step", user="on_step"),
    # while the engine is made
    Seam("watch", instead_of(wrappers, "watch"), "StopIteration", "starting to record an engine"),
    # the ring and the spool
    Seam("ring-raises", ring_of_the_front_end, "MemoryError", STEP, 20),
    Seam("ring-text", ring_of_the_front_end, "text", STEP, 20),
    Seam("trace", instead_of(TraceWriter, "append"), "OSError", "writing the trace", core="off"),
    Seam("drain", instead_of(RingReader, "poll"), "BaseException", "draining the ring", core="off"),
    # inside the engine core
    Seam("core-scheduled", instead_of(StepAccount, "_scheduled"), "Exception", CORE, 3),
    Seam("core-ended", instead_of(StepAccount, "_ended"), "RecursionError", CORE, 3),
    Seam("core-look-up", instead_of(Lookups, "_looked_up"), "MemoryError", CORE, 4),
    Seam("core-blame", instead_of(PoolAccount, "blame"), "BaseException", CORE),
    Seam("core-preemption", instead_of(Writer, "preemption"), "unprintable", CORE),
    Seam("core-computed", core_read("computed"), "text", CORE, 30),
]


class Loud(logging.Handler):
    """The warnings of kvhook's."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@pytest.fixture
def loud() -> Any:
    kvhook.uninstall()
    handler = Loud()
    logging.getLogger("kvhook").addHandler(handler)
    yield handler
    logging.getLogger("kvhook").removeHandler(handler)
    kvhook.uninstall()


@pytest.mark.parametrize("seam", SEAMS, ids=[seam.name for seam in SEAMS])
def test_a_seam_that_fails_leaves_the_engines_outputs_as_they_are_and_is_told(
    seam: Seam, make_llm: MakeLLM, expected: list[Any], loud: Loud
):
    act = late(ACTS[seam.behaviour], seam.after)
    user: dict[str, Any] = {"labels": act} if seam.user == "labels" else {}
    with kvhook.install(level=seam.level, core=seam.core, **user) as session:
        with pytest.MonkeyPatch.context() as patch:
            seam.put(patch, act)
            if seam.user == "on_step":
                session.on_step(act, every=0.01)
            assert drive(make_llm()) == expected
            if seam.in_a_thread:
                deadline = time.monotonic() + 60
                while seam.where not in session.faults and time.monotonic() < deadline:
                    time.sleep(0.01)
        session.summary()
        health = session.health()
    said = [text for text in loud.said if " failed: " in text]
    if not seam.where:
        assert health.ok, str(health)
        assert said == []
        return
    (told,) = [each for each in health.seams if each.where == seam.where]
    assert not health.ok
    assert len([text for text in said if text.startswith(f"kvhook: {seam.where} failed")]) == 1, "told once"
    assert told.first_error
    limit = LIMITS.get(seam.where)
    if limit == 1:
        assert (told.errors, told.off) == (1, True)
    elif limit is not None:
        assert told.errors <= limit
        assert told.off == (told.errors == limit)
