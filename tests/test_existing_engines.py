"""Engines that were made before kvhook was installed are found, wherever they are held, even if V1 has frozen them."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator

import pytest

from kvhook import hooks
from tests.conftest import Python
from tests.standin import fake_vllm

PROGRAM = """
import gc, json, sys
import kvhook
from kvhook import hooks
from tests.standin import fake_vllm

class LLM:
    def __init__(self, engine):
        self.llm_engine = engine

def found():
    return [type(engine).__name__ for engine in hooks.engines_alive()]

with fake_vllm() as vllm:
    {made}
    gc.collect()
    gc.freeze()
    said = found()
    session = kvhook.install()
    print(json.dumps([said, session.unrecorded_engines]))
"""


@pytest.mark.parametrize(
    "made",
    [
        "llm = LLM(vllm.engine())",
        "engines = {'first': [LLM(vllm.engine())]}",
        "import threading; here = threading.Event(); go_on = threading.Event()\n"
        "    def work(llm): here.set(); go_on.wait()\n"
        "    threading.Thread(target=work, args=(LLM(vllm.engine()),), daemon=True).start(); here.wait()",
        "def trainer(llm):\n        while True: yield llm\n    run = trainer(LLM(vllm.engine())); next(run)",
    ],
    ids=["a variable", "a list in a dictionary", "another thread's variable", "a generator's variable"],
)
def test_a_frozen_engine_is_found(made: str, python: Python):
    done = python(PROGRAM.format(made=made))
    assert json.loads(done.stdout) == [["LLMEngine"], 1]
    assert "an engine exists already" in done.stderr


@pytest.fixture
def frozen() -> Iterator[None]:
    gc.collect()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("frozen")
def test_an_engine_of_a_class_made_of_vllms_is_found_whether_frozen_or_not():
    with fake_vllm() as vllm:
        engine = vllm.engine()
        own = type("Own", (type(engine),), {})
        engine.__class__ = own
        assert [each is engine for each in hooks.engines_alive()] == [True]
        gc.freeze()
        assert [each is engine for each in hooks.engines_alive()] == [True]


def test_looking_for_engines_keeps_none_alive(python: Python):
    """A function that deletes its engine gets rid of it, though it was found among the function's variables."""
    program = """
import gc, weakref
from kvhook import hooks
from tests.standin import fake_vllm

def run(vllm):
    engine = vllm.engine()
    gc.collect()
    gc.freeze()
    assert len(hooks.engines_alive()) == 1
    gone = weakref.ref(engine)
    del engine
    assert gone() is None
    return "gone"

with fake_vllm() as vllm:
    print(run(vllm))
"""
    assert python(program).stdout == "gone\n"
