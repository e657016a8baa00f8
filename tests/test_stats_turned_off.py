"""The stats of an engine's front end are turned off between two steps: from then on its outputs are counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kvhook
from tests.contracts.behaviour import make_engine
from tests.contracts.core import Prompt, Said, Sent, add
from tests.contracts.core_engines import SYNC, engines_of
from tests.contracts.loader import stubs


def flag(engine: Any) -> None:
    engine.log_stats = False


def logger(engine: Any) -> None:
    engine.logger_manager = None


@pytest.mark.parametrize("turn_off", [flag, logger])
@pytest.mark.parametrize("stats", [False, True], ids=["stats off", "stats on"])
@pytest.mark.parametrize("release", ["0.11.2", "0.19.1", "0.32.0"])
def test_one_step_is_not_counted_and_that_is_said(
    fresh: Path,
    step_path: str,
    release: str,
    stats: bool,
    turn_off: Callable[[Any], None],
    caplog: pytest.LogCaptureFixture,
):
    with stubs(engines_of(release)), kvhook.install(ring_slots=64) as session:
        engine = make_engine(SYNC, log_stats=stats)
        for name in "abc":
            add(engine, name, Prompt(computed=10))
        more = [Sent((Said("a"), Said("b"), Said("c")), running=3, looked_up=10) for _ in range(12)]
        engine.engine_core.plan += more
        for _ in range(6):
            engine.step()
        turn_off(engine)
        for _ in range(6):
            engine.step()
        add(engine, "d", Prompt(computed=20))
        engine.engine_core.plan += [Sent((*(Said(name, finished=True) for name in "abcd"),), running=0)]
        engine.step()
        steps, summary = session.steps(), session.summary()
        assert session.faults == {}
    assert steps["num_generation_tokens"].tolist() == [3] * 6 + [0] + [3] * 5 + [4]
    assert steps["has_iteration_stats"].tolist() == [1] * 6 + [0] + [1] * 6
    assert steps["prefix_cache_queries"].tolist() == [10] * 12 + [0]
    assert steps["num_finished_reqs"].tolist() == [0] * 12 + [4]
    assert (steps["t_end_ns"] > steps["t_start_ns"]).all()
    assert summary.num_generation_tokens is None
    assert caplog.text.count("were turned off, or their logger taken away") == 1
    assert caplog.text.count("came that nobody counted") == 1


@pytest.mark.parametrize("release", ["0.11.2", "0.32.0"])
def test_a_step_of_the_engine_that_fails_is_not_taken_for_it(
    fresh: Path, step_path: str, release: str, caplog: pytest.LogCaptureFixture
):
    with stubs(engines_of(release)), kvhook.install(ring_slots=64) as session:
        engine = make_engine(SYNC, log_stats=False)
        add(engine, "a", Prompt(computed=10))
        engine.engine_core.plan += [Sent((Said("a"),), running=1) for _ in range(6)]
        for _ in range(3):
            engine.step()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(engine.output_processor), "_update_stats_from_output", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                engine.step()
        engine.step()
        assert session.steps()["level"].tolist() == [session.steps()["level"][0]] * 5
        assert session.faults == {}
    assert "turned off" not in caplog.text
