"""What kvhook puts into an engine at level light, or when it steps down to it, and that it is taken out again."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest

import kvhook
from kvhook.errors import StatsOffError
from kvhook.recording import budget as cost
from tests.contracts.behaviour import VllmLogger
from tests.contracts.core_engines import ON_LOOP, SYNC, V1_RELEASES, engines_of
from tests.contracts.light.expected import BY_NAME, ENGINES
from tests.contracts.light.script import EXPECTED, RUNNING, SCRIPT, begin, check, go
from tests.contracts.loader import stubs
from tests.contracts.releases import between

pytestmark = pytest.mark.usefixtures("fresh")


# Putting back, attaching, going


@pytest.mark.parametrize(("release", "name"), ENGINES)
def test_uninstall_in_mid_life_takes_out_what_was_put_into_the_engine(release: str, name: str):
    with stubs(engines_of(release)), kvhook.install(level="light", ring_slots=64) as session:
        engine = begin(BY_NAME[name].engine, script=SCRIPT[:2])
        put_in = {n for o in (engine.engine_core, engine.output_processor) for n, v in vars(o).items() if callable(v)}
        requests = {"add_request", "abort_requests"}
        tap = {"get_output"} if BY_NAME[name].timed else {"get_output_async", "process_outputs"}
        assert put_in == tap | requests
        go(engine)
        kvhook.uninstall()
        left = [n for o in (engine.engine_core, engine.output_processor) for n, v in vars(o).items() if callable(v)]
        assert left == []
        engine.engine_core.plan += SCRIPT[2:]
        go(engine)
        assert engine.output_processor.request_states == {}
        check(session.steps(), release, EXPECTED[:2])


def test_somebody_elses_replacement_over_ours_stays_and_ours_records_no_more():
    with stubs(engines_of("0.32.0")), kvhook.install(level="light", ring_slots=64) as session:
        engine = begin(SYNC)
        ours = engine.output_processor.process_outputs
        calls = []

        def theirs(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return ours(*args, **kwargs)

        engine.output_processor.process_outputs = theirs
        go(engine, 2)
        kvhook.uninstall()
        assert engine.output_processor.process_outputs is theirs
        go(engine)
        assert len(calls) == len(SCRIPT)
        check(session.steps(), "0.32.0", EXPECTED[:2])


@pytest.mark.parametrize(("release", "name"), [e for e in ENGINES if not e[1].endswith("light-0.8")])
def test_attach_at_level_light(release: str, name: str):
    with stubs(engines_of(release)):
        engine = begin(BY_NAME[name].engine, log_stats=True)
        session = kvhook.install(level="light", ring_slots=64)
        assert kvhook.attach(engine) is session
        go(engine)
        check(session.steps(), release)
        assert (session.steps()["level"] == 1).all()


def test_attach_at_level_light_to_an_engine_whose_core_makes_no_stats_says_so():
    with stubs(engines_of("0.32.0")):
        engine = begin(SYNC, log_stats=False)
        kvhook.install(level="light", ring_slots=64)
        with pytest.raises(StatsOffError, match=r"disable_log_stats=False"):
            kvhook.attach(engine)
        go(engine)


def test_attach_at_level_light_to_an_engine_of_0_8_says_why_it_cannot_be():
    with stubs(engines_of("0.8.5")):
        engine = begin(SYNC, log_stats=True)
        engine.log_stats = True
        kvhook.install(level="light", ring_slots=64)
        with pytest.raises(StatsOffError, match=r"0\.8\.5.*kvhook\.install\(\) before"):
            kvhook.attach(engine)


@pytest.mark.parametrize("path", [SYNC, ON_LOOP])
def test_an_engine_that_is_deleted_is_gone(path: str):
    with stubs(engines_of("0.32.0")), kvhook.install(level="light", ring_slots=64) as session:
        engine = begin(path)
        go(engine)
        gone = [weakref.ref(one) for one in (engine, engine.engine_core, engine.output_processor)]
        del engine
        gc.collect()
        assert [ref() for ref in gone] == [None] * 3
        check(session.steps(), "0.32.0")


# Stepping down


@pytest.mark.parametrize("log_stats", [False, True], ids=["off", "on"])
@pytest.mark.parametrize("release", V1_RELEASES)
def test_an_engine_at_level_full_can_go_on_at_level_light(
    release: str, log_stats: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cost, "WINDOW", 1)
    monkeypatch.setattr(cost, "WINDOWS", 1)
    with stubs(engines_of(release)), kvhook.install(max_overhead=1e-9, ring_slots=64) as session:
        engine = begin(SYNC, log_stats=log_stats)
        go(engine, 1)
        assert session.faults == {}
        at_full = len(engine.output_processor.given)
        go(engine)
        steps = session.steps()
        check(steps, release, tuple((int(steps["has_iteration_stats"][i]), *row[1:]) for i, row in enumerate(EXPECTED)))
        assert steps["level"].tolist() == [0, 1, 1, 1, 1, 1]
        assert steps["num_running_reqs"].tolist() == RUNNING
        assert steps["step"].tolist() == list(range(6))
        # the user's own stats go on; those that only kvhook had turned on are made no more
        own = log_stats and not between(release, "0.8.0", "0.8.5.post1")
        made = [own and (bool(sent.outputs) or not between(release, "0.28.0")) for sent in SCRIPT[1:]]
        assert [stats is not None for stats in engine.output_processor.given[at_full:]] == made
        assert engine.output_processor.log_stats is own
        assert engine.engine_core.log_stats is True
        seen = 5 if between(release, "0.17.0", "0.27.1") else 6
        assert [len(logger.seen) for logger in VllmLogger.made] == ([seen] if own else [])
        if not log_stats and between(release, "0.9.0"):
            with pytest.raises(AssertionError, match="Stat logging disabled"):
                engine.get_metrics()
        kvhook.uninstall()
        left = [n for o in (engine.engine_core, engine.output_processor) for n, v in vars(o).items() if callable(v)]
        assert left == []


@pytest.mark.parametrize("release", V1_RELEASES)
def test_at_level_full_too_uninstall_leaves_nothing_in_the_engine(release: str):
    """After the first step the probe waits for the next."""
    with stubs(engines_of(release)), kvhook.install(ring_slots=64) as session:
        engine = begin(SYNC)
        go(engine, 1)
        kvhook.uninstall()
        left = [n for o in (engine.engine_core, engine.output_processor) for n, v in vars(o).items() if callable(v)]
        assert left == []
        go(engine)
        assert len(session.steps()) == 1
        assert session.faults == {}
