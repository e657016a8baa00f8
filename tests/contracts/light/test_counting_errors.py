"""Errors while level light counts: vLLM's own pass through, and kvhook's stop the recording of one engine alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import kvhook
from kvhook.adapters.light import Counts
from tests.contracts import core
from tests.contracts.core import Said, Sent
from tests.contracts.core_engines import ON_LOOP, SYNC, engines_of
from tests.contracts.light.expected import BY_NAME, ENGINES
from tests.contracts.light.script import begin, check, go
from tests.contracts.loader import stubs

pytestmark = pytest.mark.usefixtures("fresh")


class Sour:
    """Tokens that cannot be counted."""

    def __len__(self) -> int:
        raise ValueError("no length")


@pytest.mark.parametrize(("release", "name"), ENGINES)
def test_an_error_in_the_counter_stops_the_recording_of_that_engine_alone(
    release: str, name: str, monkeypatch: pytest.MonkeyPatch, said: Any
):
    path = BY_NAME[name].engine
    with stubs(engines_of(release)), kvhook.install(level="light", ring_slots=64) as session:
        bad, good = begin(path), begin(path)
        own = dict(vars(bad.output_processor)), dict(vars(bad.engine_core))
        monkeypatch.setattr(Counts, "__init__", lambda self: 1 / 0)
        outputs = go(bad)
        monkeypatch.undo()
        assert outputs in ([], [["a", "b"], ["b", "a"], [], ["c", "b"], ["c", "a"], []])
        assert session.faults == {"counting what a step gave": 1}
        (told,) = said()
        assert "counting what a step gave failed: ZeroDivisionError" in told
        assert "this engine is not recorded any further" in told
        # nothing of kvhook's is left in it
        assert {"get_output", "get_output_async"} & own[1].keys()
        assert not {"get_output", "get_output_async"} & vars(bad.engine_core).keys()
        assert "process_outputs" not in vars(bad.output_processor)
        go(good)
        by_engine = {int(e): session.steps(e) for e in set(session.steps()["engine"].tolist())}
        check(by_engine.pop(max(by_engine)), release)
        # of the bad one no step has counts, and none pretends to
        assert sum(int(steps["has_iteration_stats"].sum()) for steps in by_engine.values()) == 0
        assert sum(len(steps) for steps in by_engine.values()) <= 1


@pytest.mark.parametrize("path", [SYNC, ON_LOOP])
def test_an_output_that_cannot_be_counted_reaches_vllm_as_it_is(path: str):
    """What is wrong with it is vLLM's to say."""
    with stubs(engines_of("0.32.0")), kvhook.install(level="light", ring_slots=64) as session:
        engine = begin(path)
        make = core._message

        def spoiled(*given: Any) -> Any:
            message = make(*given)
            for output in message.outputs:
                output.new_token_ids = Sour()
            return message

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(core, "_message", spoiled)
            with pytest.raises(ValueError, match="no length") as caught:
                go(engine)
        # it is vLLM's own code that failed on it, not kvhook's
        frames = [frame.path for frame in caught.traceback]
        assert Path(str(frames[-1])).name == "test_counting_errors.py"
        assert "light.py" not in [Path(str(frame)).name for frame in frames]
        assert session.faults == {"counting what a step gave": 1}


@pytest.mark.parametrize("path", [SYNC, ON_LOOP])
def test_an_error_of_vllms_own_passes_through_and_the_recording_goes_on(path: str):
    with stubs(engines_of("0.32.0")), kvhook.install(level="light", ring_slots=64) as session:
        engine = begin(path)
        processor = type(engine.output_processor)
        with pytest.MonkeyPatch.context() as patch:

            def fail(*_: Any) -> None:
                raise RuntimeError("vLLM's own")

            patch.setattr(processor, "_update_stats_from_output", fail)
            with pytest.raises(RuntimeError, match="vLLM's own"):
                go(engine, 1)
        assert session.faults == {}
        engine.engine_core.plan[:] = [Sent((Said("a", tokens=5),), running=1)]
        go(engine)
        assert session.steps()["num_generation_tokens"].tolist()[-1] == 5
