"""The extension's own objects: each does what the Python code does whose place it takes."""

from __future__ import annotations

import gc
import inspect
import re
import sys
import types
import weakref
from pathlib import Path
from random import Random
from typing import Any

import pytest
import wrapt

from kvhook import _step, schema
from kvhook.adapters import BY_LEVEL
from kvhook.adapters.light import EVENT, Counts, make_counter
from kvhook.adapters.program import CannotCompile, Program, compile_program
from kvhook.adapters.publisher import compile_publisher
from kvhook.adapters.step_functions import Counters
from kvhook.adapters.table import lookup
from kvhook.hooks import wrappers
from kvhook.hooks.registry import registry
from kvhook.ring import layout
from kvhook.ring.writer import RingWriter
from tests.contracts.loader import build_stub_modules, load, stubs
from tests.step import odd_objects, two_paths

pytestmark = pytest.mark.skipif(_step.native is None, reason=f"no extension here: {_step.why_not}")
native: Any = _step.native
FOLDER = Path(_step.__file__).parent


# What is written down twice


def test_the_constants_of_the_c_files_are_pythons():
    text = "".join(path.read_text() for path in sorted(FOLDER.glob("*.h")))
    found = {name: int(value) for name, value in re.findall(r"([A-Z_]+) = (\d+)[,} ]", text)}
    assert {n: found[n] for n in ("STAMP_AT", "CRC_AT", "BODY_AT", "FIELDS_AT")} == {
        "STAMP_AT": layout.STAMP_AT,
        "CRC_AT": layout.CRC_AT,
        "BODY_AT": layout.BODY_AT,
        "FIELDS_AT": layout.FIELDS_AT,
    }
    assert found["HEAD_AT"] == 8 * layout.HEAD_WORD
    assert (found["KIND_STEP"], found["KIND_REQUEST"], found["KIND_VALUES"]) == (
        schema.STEP,
        schema.REQUEST,
        schema.VALUES,
    )


@pytest.mark.parametrize("release", ["0.6.0", "0.7.3", "0.8.5", "0.9.2", "0.11.0", "0.20.2", "0.33.0"])
def test_each_table_of_a_release_can_be_compiled(release: str):
    compiled = 0
    with stubs(build_stub_modules(load(release))):
        for adapter in {a.name: a for level in BY_LEVEL.values() for a in level}.values():
            try:
                made = compile_publisher(adapter, {"num_kv_blocks": 10, "sees_schedule": True, "on_gpu": True})
            except LookupError:
                continue  # another era's
            compile_program(made.plan, made.layout, native)
            compiled += 1
    assert compiled


@pytest.mark.parametrize("beyond", ["[x for x in a]", "f(*a)", "f(a=1)", "a if b is c else d", "unheard_of", "a > 1"])
def test_an_expression_that_the_machine_does_not_know_is_left_to_python(beyond: str):
    program = Program(native, {"a": [1], "b": 1, "c": 2, "d": 3, "f": len})
    with pytest.raises(CannotCompile):
        program.expression(beyond)


# The ring


@pytest.mark.parametrize("crc", [False, True])
def test_both_writers_write_the_same_file(tmp_path: Path, crc: bool, monkeypatch: pytest.MonkeyPatch):
    slots = layout.make_layout({})
    records = [slots.struct_of("values").pack(n, schema.VALUES, 3, n, 0, 5) for n in range(19)]
    files = []
    for writer in (native, None):
        monkeypatch.setattr(_step, "native", writer)
        ring = RingWriter(tmp_path / f"{writer is None}.ring", slots, 8, {"kvhook": "test"}, crc=crc)
        assert type(ring.publish).__name__ == ("RingStore" if writer else "function")
        for n, record in enumerate(records):
            assert ring.publish(n, record) == n + 1
        assert ring.head == len(records)
        files.append(ring.path.read_bytes()[ring.header_bytes :])
        ring.close()
    assert files[0] == files[1]


@pytest.mark.parametrize("wrong", [b"", b"x", b"x" * 4096])
def test_a_record_of_another_length_is_refused(tmp_path: Path, wrong: bytes):
    ring = RingWriter(tmp_path / "a.ring", layout.make_layout({}), 8, {"kvhook": "test"})
    with pytest.raises(ValueError, match="as long as a slot's body"):
        ring.publish(0, wrong)
    assert ring.head == 0


def test_no_ring_is_made_of_a_map_that_is_too_small():
    with pytest.raises(ValueError, match="no such ring"):
        native.RingStore(bytearray(4096), 4096, 448, 8)


# The step


class Engine:
    def step(self, tokens: int, *, fail: BaseException | None = None) -> tuple[int, int]:
        """A step."""
        if fail is not None:
            raise fail
        return id(self), tokens


@pytest.fixture
def hooked(monkeypatch: pytest.MonkeyPatch) -> type[Engine]:
    made = type("Hooked", (Engine,), {"step": wrappers.around_step(Engine.step)})
    assert type(vars(made)["step"]) is native.StepMethod
    return made


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, BaseException]]:
    found: list[tuple[str, BaseException]] = []
    monkeypatch.setattr(type(registry), "fault", lambda self, where, error, then: found.append((where, error)))
    return found


def record(engine: Any, publish: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.steps, id(engine), publish)


def test_a_step_is_published_with_clocks_around_it(hooked: type[Engine], monkeypatch: pytest.MonkeyPatch):
    engine, seen = hooked(), []
    record(engine, lambda start, end: seen.append((start, end)), monkeypatch)
    assert engine.step(3) == (id(engine), 3)
    assert hooked.step(engine, tokens=4) == (id(engine), 4)
    assert len(seen) == 2
    assert all(0 < start <= end for start, end in seen)
    assert hooked().step(5)[1] == 5
    assert len(seen) == 2, "an engine that is not recorded was"


def test_what_an_engine_that_is_not_known_is_recorded_by_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    answers: list[Any] = [None, lambda start, end: seen.append((start, end)), KeyboardInterrupt()]
    seen: list[tuple[int, int]] = []
    asked = []

    def unseen(engine: Any) -> Any:
        asked.append(engine)
        answer = answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    method: Any = native.StepMethod(Engine.step, {}, print, unseen)
    engine = type("Asking", (Engine,), {"step": method})()
    assert engine.step(1) == (id(engine), 1)
    assert seen == []
    assert engine.step(2) == (id(engine), 2)
    assert len(seen) == 1
    with pytest.raises(KeyboardInterrupt):
        engine.step(3)
    assert asked == [engine] * 3
    method.kvhook_stop()
    assert engine.step(4) == (id(engine), 4)
    assert len(asked) == 3


def test_an_engines_exception_passes_and_its_step_is_published(hooked: type[Engine], monkeypatch: pytest.MonkeyPatch):
    engine, seen = hooked(), []
    record(engine, lambda start, end: seen.append(sys.exc_info()[0]), monkeypatch)
    error = KeyError("the engine's own")
    with pytest.raises(KeyError) as caught:
        engine.step(1, fail=error)
    assert caught.value is error
    assert len(seen) == 1


@pytest.mark.parametrize("fail", [None, RuntimeError("the engine's")])
def test_an_exception_of_kvhooks_ends_there(
    hooked: type[Engine], faults: list[Any], fail: BaseException | None, monkeypatch: pytest.MonkeyPatch
):
    engine, wrong = hooked(), ValueError("kvhook's")

    def publish(start: int, end: int) -> None:
        raise wrong

    record(engine, publish, monkeypatch)
    if fail is None:
        assert engine.step(1) == (id(engine), 1)
    else:
        with pytest.raises(RuntimeError) as caught:
            engine.step(1, fail=fail)
        assert caught.value is fail
    assert faults == [("recording a step", wrong)]
    assert id(engine) not in registry.steps
    assert engine.step(2) == (id(engine), 2)


@pytest.mark.parametrize("fail", [None, RuntimeError("the engine's")])
def test_ctrl_c_while_a_step_is_published_is_the_users(
    hooked: type[Engine], faults: list[Any], fail: BaseException | None, monkeypatch: pytest.MonkeyPatch
):
    engine = hooked()

    def publish(start: int, end: int) -> None:
        raise KeyboardInterrupt

    record(engine, publish, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        engine.step(1, fail=fail)
    assert faults == []  # it is no failure of kvhook's
    assert id(engine) in registry.steps, "nothing of kvhook's has failed"


def test_a_hooked_step_looks_like_the_original(hooked: Any):
    step: Any = hooked.step
    assert inspect.isfunction(step)
    assert inspect.signature(step) == inspect.signature(Engine.step)
    assert list(inspect.signature(hooked().step).parameters) == ["tokens", "fail"]
    assert (step.__name__, step.__doc__, step.__module__) == ("step", "A step.", __name__)
    assert vars(hooked)["step"].__wrapped__ is Engine.step
    with pytest.raises(TypeError, match="step"):
        step()


def test_a_step_that_is_no_function_stays_with_wrapt():
    assert type(wrappers.around_step(staticmethod(len))) is wrapt.FunctionWrapper


def test_a_publisher_in_a_circle_is_let_go_of():
    with two_paths.table("0.32.0", "full", "v1") as adapter:
        compiled = two_paths.compile_one(adapter, Random(0))

    class Session:
        functions: Any

        def on_sample(self, *_: int) -> int:
            return -1

    session = Session()
    session.functions = compiled._bind_native(lambda n, r: n + 1, 0, lambda: 1, session.on_sample, Counters(), print)
    gone = weakref.ref(session)
    del session
    gc.collect()
    assert gone() is None


# Counting


def make_outputs(r: Random, odd: float, preempted: Any) -> tuple[Any, Any]:
    """Outputs of a step and the front end's requests, some of them unlike anything that vLLM makes."""
    slotted = type("Output", (), {"__slots__": ("request_id", "new_token_ids", "events")})
    states: dict[Any, Any] = {}
    outputs = []
    for number in range(r.choice((0, 1, 3, 30))):
        events: Any = None
        if r.random() < 0.2:
            events = [
                types.SimpleNamespace(type=r.choice((preempted, preempted, 8, "PREEMPTED")))
                for _ in range(r.randrange(3))
            ]
        members = {
            "request_id": [] if r.random() < odd else f"r{number}",
            "new_token_ids": odd_objects.latencies(r, 1.0) if r.random() < odd else [1] * r.randrange(4),
            "events": odd_objects.odd_number(r) if r.random() < odd else events,
        }
        if r.random() < odd:
            del members[r.choice(sorted(members))]
        output = slotted() if r.random() < 0.6 else odd_objects.holder(r, members, odd)
        if isinstance(output, slotted):
            for name, value in members.items():
                setattr(output, name, value)
        outputs.append(output)
        if r.random() < 0.9:
            prefilling: Any = odd_objects.odd_number(r) if r.random() < odd else r.random() < 0.3
            states[f"r{number}"] = odd_objects.holder(r, {"is_prefilling": prefilling, "prompt_len": 10}, odd / 4)
    kind = r.random()
    given: Any = outputs if kind < 0.8 else tuple(outputs) if kind < 0.9 else iter(outputs)
    return given, types.MappingProxyType(states) if r.random() < 0.2 else states


def count(counter: Any, seed: int, preempted: Any) -> tuple[Any, ...]:
    r = Random(seed)
    outputs, states = make_outputs(r, r.choice((0.0, 0.02, 0.2)), preempted)
    counts = Counts()
    try:
        ended: Any = counter(outputs, states, counts)
    except BaseException as error:
        ended = type(error), re.sub("0x[0-9a-f]+", "", str(error))
    return ended, vars(counts)


def test_both_counters_count_alike_and_fail_alike(monkeypatch: pytest.MonkeyPatch):
    modules = build_stub_modules(load("0.13.0"))
    with stubs(modules):
        preempted = lookup(f"{EVENT}.PREEMPTED")
        in_c = make_counter()
        monkeypatch.setattr(_step, "native", None)
        in_python = make_counter()
    assert type(in_c).__name__ == "Counter"
    for seed in range(1500):
        assert count(in_c, seed, preempted) == count(in_python, seed, preempted), f"seed {seed}"


def test_a_class_that_changes_is_read_as_it_is_now():
    slotted: Any = type("Output", (), {"__slots__": ("request_id", "new_token_ids", "events")})
    output = slotted()
    output.request_id, output.new_token_ids, output.events = "a", [1, 2], None
    counter = native.Counter(7, lambda counts, output, state: None)
    states = {"a": types.SimpleNamespace(is_prefilling=False)}
    counts = Counts()
    counter([output], states, counts)
    slotted.new_token_ids = property(lambda self: [1] * 10)
    counter([output], states, counts)
    assert counts.num_generation_tokens == 12
