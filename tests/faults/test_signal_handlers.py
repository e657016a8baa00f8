"""What a signal handler of the user's raises, a time limit for instance, is the user's wherever it comes: it goes on,
is no fault of kvhook's, and the next step is recorded."""

from __future__ import annotations

import contextlib
import functools
import gc
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kvhook
from kvhook.faults import Faults, contained, is_users
from kvhook.ring.trace_file import TraceWriter
from tests.faults.odd import Odd
from tests.faults.test_engine_core import FUNCTIONS, record, run, scheduler
from tests.faults.test_front_end import READ, WAYS, odd_stats
from tests.standin import fake_vllm, step_stats

pytestmark = pytest.mark.usefixtures("fresh")

OUTPUT = ["output of the step"]


class Limit(Exception):
    """Time is up."""


def by_name(signum: int, frame: Any) -> None:
    raise Limit


def by_any_arguments(*args: Any, **kwargs: Any) -> None:
    raise Limit


def deep_down(signum: int, frame: Any) -> None:
    def inner() -> None:
        raise Limit

    inner()


def that_forgets(signum: Any, frame: Any) -> None:
    del signum, frame
    raise Limit


def that_resets(signum: int, frame: Any) -> None:
    signal.signal(signum, signal.SIG_DFL)
    raise Limit


def given_more(more: str, signum: int, frame: Any) -> None:
    raise Limit


class Timer:
    def method(self, signum: int, frame: Any) -> None:
        raise Limit

    def __call__(self, signum: int, frame: Any) -> None:
        del signum, frame
        raise Limit


def as_timeout(signum: int, frame: Any) -> None:
    raise TimeoutError("an OSError, as one from a disk")


HANDLERS: dict[str, tuple[Callable[..., None], type[Exception]]] = {
    "function": (by_name, Limit),
    "any arguments": (by_any_arguments, Limit),
    "deep down": (deep_down, Limit),
    "forgets its arguments": (that_forgets, Limit),
    "resets itself": (that_resets, Limit),
    "partial": (functools.partial(given_more, "more"), Limit),
    "method": (Timer().method, Limit),
    "object": (Timer(), Limit),
    "TimeoutError": (as_timeout, TimeoutError),
}


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    before = signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGALRM)
    signal.signal(signal.SIGUSR1, by_name)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGUSR1, before[0])
    signal.signal(signal.SIGALRM, before[1])


def now(value: Any = None) -> Any:
    """The signal comes at this very place."""
    signal.raise_signal(signal.SIGUSR1)
    return value


def once() -> Callable[[Any], Any]:
    """The signal comes when this is called first. What the step has handed over is read again when the next one is."""
    left = [now]
    return lambda value: left.pop()(value) if left else value


def one_more_step(session: Any, engine: Any) -> None:
    """The engine is recorded as before, and nothing has failed."""
    before = len(session.steps())
    engine.plan.append(step_stats(generated=1))
    assert engine.step() == OUTPUT
    steps = session.steps()
    assert len(steps) == before + 1
    assert steps["step"].tolist() == list(range(len(steps)))
    assert session.faults == {}
    assert session.health().ok


@pytest.mark.usefixtures("both_paths")
@pytest.mark.parametrize("kind", HANDLERS)
def test_whatever_the_handler_is(kind: str):
    handler, error = HANDLERS[kind]
    signal.signal(signal.SIGUSR1, handler)
    with fake_vllm() as vllm, kvhook.install(ring_slots=64, core="off") as session:
        engine, stats = vllm.engine(), step_stats(generated=1)
        engine.plan.append((stats[0], Odd(stats[1], "num_generation_tokens", once()), *stats[2:]))
        with pytest.raises(error):
            engine.step()
        one_more_step(session, engine)


@pytest.mark.usefixtures("both_paths")
@pytest.mark.parametrize(("source", "attribute"), [each for each in READ if each[0] in WAYS])
def test_wherever_a_step_is_read(source: str, attribute: str):
    with fake_vllm() as vllm, kvhook.install(ring_slots=64, core="off") as session:
        engine = vllm.engine()
        engine.plan.append(odd_stats(source, attribute, once()))  # type: ignore[arg-type]
        with pytest.raises(Limit):
            engine.step()
        one_more_step(session, engine)


@contextlib.contextmanager
def nothing_collected() -> Iterator[None]:
    """No garbage of other tests is collected meanwhile: Python prints what is raised in a finalizer, and goes on."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.usefixtures("both_paths")
def test_between_any_two_instructions_of_a_step():
    """A real timer: as many limits reach the user as were raised."""
    wanted, raised, seen, inside = 200, 0, 0, False

    def limit(signum: int, frame: Any) -> None:
        nonlocal raised, inside
        if inside:
            inside = False
            raised += 1
            raise Limit

    signal.signal(signal.SIGALRM, limit)
    with fake_vllm() as vllm, kvhook.install(core="off") as session, nothing_collected():
        engine = vllm.engine()
        signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0003)
        while raised < wanted:
            engine.plan.append(step_stats(generated=1))
            try:
                inside = True
                engine.step()
                inside = False
            except Limit:
                seen += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert seen == raised
        before = session.health()
        assert session.faults == {}
        engine.plan.append(step_stats(generated=1))
        assert engine.step() == OUTPUT
        assert session.health().records == before.records + 1


@pytest.mark.usefixtures("both_paths")
def test_one_that_comes_while_another_is_looked_at(monkeypatch: pytest.MonkeyPatch):
    """The second is raised in the middle of finding out whose the first is."""
    raising = signal.getsignal
    came: list[Any] = []

    def twice(number: Any) -> Any:
        if not came:
            came.append(number)
            now()
        return raising(number)

    monkeypatch.setattr(signal, "getsignal", twice)
    with fake_vllm() as vllm, kvhook.install(ring_slots=64, core="off") as session:
        engine = vllm.engine()
        stats = step_stats(generated=1)
        engine.plan.append((stats[0], Odd(stats[1], "num_generation_tokens", once()), *stats[2:]))
        with pytest.raises(Limit):
            engine.step()
        assert came
        one_more_step(session, engine)


def test_while_a_function_for_labels_works():
    with fake_vllm() as vllm, kvhook.install(ring_slots=64, core="off", labels=now) as session:
        engine = vllm.engine()
        with pytest.raises(Limit):
            session.label_request(engine, "1", "")
        one_more_step(session, engine)


def test_while_the_recording_is_read_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch):
    """As an OSError, which the disk's own errors are."""
    signal.signal(signal.SIGUSR1, as_timeout)
    with fake_vllm() as vllm, kvhook.install(ring_slots=64, core="off") as session:
        engine = vllm.engine()
        session._spool._background.end()  # the records are copied in this thread, when they are asked for
        engine.plan += [step_stats(generated=1)] * 5
        for _ in range(5):
            engine.step()
        with monkeypatch.context() as patch:
            patch.setattr(TraceWriter, "append", lambda *_: now())
            with pytest.raises(TimeoutError):
                session.steps()
        assert len(session.steps()) == 5
        one_more_step(session, engine)


@pytest.mark.usefixtures("both_paths")
@pytest.mark.parametrize(("cls", "name"), FUNCTIONS, ids=lambda each: getattr(each, "__name__", each))
def test_inside_the_engine_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cls: type, name: str):
    real = getattr(cls, name)
    came: list[str] = []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if not came:
            came.append(name)
            now()
        return real(*args, **kwargs)

    monkeypatch.setattr(cls, name, interrupted)
    faults: list[BaseException] = []
    sched = scheduler()
    recorder = record(sched, tmp_path, faults)
    try:
        run(sched)
    except Limit:
        assert came
    else:
        assert not came, "it was kept from the user"
    assert faults == []
    account = recorder.account()
    assert account is not None
    assert account.state.on, "the core is recorded as before"
    recorder.stop()
    recorder.close()


def kvhooks_own() -> None:
    raise ValueError("an error of kvhook's")


@pytest.mark.parametrize("own", [kvhooks_own, functools.partial(int, "x"), functools.partial(next, iter(()))])
def test_an_error_without_a_signal_is_not_the_users(own: Callable[[], Any]):
    faults, caught = Faults(), []
    with contained(lambda error: caught.append((is_users(error), faults.fault("testing", error, "nothing")))):
        own()
    assert caught == [(False, True)]
    assert faults.counts == {"testing": 1}


def test_an_error_while_the_users_handler_asks_kvhook_is_kvhooks():
    """The handler is above what kvhook catches, not below."""
    found: list[bool] = []

    def asks(signum: int, frame: Any) -> None:
        catches()

    def catches() -> None:
        with contained(lambda error: found.append(is_users(error))):
            kvhooks_own()

    signal.signal(signal.SIGUSR1, asks)
    now()
    assert found == [False]


def test_handlers_that_cannot_be_looked_at_do_no_harm(monkeypatch: pytest.MonkeyPatch):
    class Odd:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError

    monkeypatch.setattr(signal, "getsignal", lambda number: Odd())
    found: list[bool] = []
    with contained(lambda error: found.append(is_users(error))):
        kvhooks_own()
    assert found == [False]
