"""Engines at work, through the hooks: a record for each step, and vLLM's own loggers see what they saw."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import pytest

import kvhook
from kvhook.errors import StatsOffError
from tests.contracts.adapters.engines import engines_of, recorded
from tests.contracts.adapters.expected import BY_NAME, ENGINES
from tests.contracts.behaviour import ASYNC, ENGINE, LOGGERS, V0_ENGINE, VllmLogger, config_of, make_engine
from tests.contracts.loader import stubs
from tests.contracts.made_stats import v0_stats, v1_stats
from tests.contracts.patching import everything, same
from tests.contracts.releases import between, since

pytestmark = pytest.mark.usefixtures("fresh")


@pytest.mark.parametrize("log_stats", [False, True])
@pytest.mark.parametrize(("release", "name"), [e for e in ENGINES if "async" not in e[1]])
def test_each_step_of_an_engine_is_one_record(release: str, name: str, log_stats: bool):
    with stubs(engines_of(release)), kvhook.install(ring_slots=64) as session:
        engine = make_engine(BY_NAME[name].engine, log_stats=log_stats)
        for tokens in (4, 5, 0, 6):
            if name == "v0":
                engine.plan.append([v0_stats(num_generation_tokens_iter=tokens)] if tokens else [])
            else:
                sched, iteration = v1_stats()
                iteration.num_generation_tokens = tokens
                # of 0.9 and 0.10 the engine insists on the scheduler's stats
                engine.plan.append((sched, iteration) if tokens or name == "v1-0.9" else (None, None))
            assert engine.step() == ["output"]
        assert session.faults == {}
        tokens_of, running = recorded(session)
        assert tokens_of == [4, 5, 0, 6]
        assert running == [3, 3, 3 if name == "v1-0.9" else -1, 3]
        assert (session.steps()["t_start_ns"] < session.steps()["t_end_ns"]).all()
        assert session.meta["engines"][0]["stats_on"] is log_stats
        # the user's own loggers are there if they were to be, and see what they would see without kvhook
        seen = [len(logger.seen) for logger in VllmLogger.made]
        assert seen == ([4 if name == "v1-0.9" else 3] if log_stats and name != "v1-0.8" else [])
        kvhook.uninstall()
        engine.plan.append([v0_stats()] if name == "v0" else v1_stats())
        assert engine.step() == ["output"]
        assert len(session.steps()) == 4


@pytest.mark.parametrize("release", since("0.8.0", "0.8.5.post1"))
def test_the_engine_of_0_8_needs_no_module_that_it_does_not_import(release: str):
    """Up to 0.8.4 nothing behind LLM imports V1's loggers."""
    without = {n: m for n, m in engines_of(release).items() if n not in (LOGGERS, ASYNC)}
    with stubs(without), kvhook.install(ring_slots=64) as session:
        engine = make_engine(f"{ENGINE}:LLMEngine", log_stats=False)
        engine.plan.append(v1_stats())
        engine.step()
        assert recorded(session) == ([4], [3])


def test_v0_stats_that_are_not_of_a_step_are_not_recorded():
    with stubs(engines_of("0.9.2")), kvhook.install(ring_slots=64) as session:
        engine = make_engine(BY_NAME["v0"].engine, log_stats=True)
        engine.plan.append([v0_stats()])
        engine.made = [v0_stats(num_running_sys=100)]
        engine.do_log_stats()
        engine.step()
        assert recorded(session) == ([4], [3])


def test_v0_on_an_event_loop_has_a_record_for_each_stats_and_no_step_to_be_timed():
    with stubs(engines_of("0.9.2")), kvhook.install(ring_slots=64) as session:
        module: Any = sys.modules[V0_ENGINE]

        class AsyncEngine(module.LLMEngine):  # type: ignore[misc]
            """As vLLM's own `_AsyncLLMEngine`: it inherits everything but the step."""

            async def step_async(self, virtual_engine: int) -> None:
                self.do_log_stats(object(), None)

        engine = AsyncEngine(config_of(), object, log_stats=False)
        for running in (1, 2):
            engine.made = [v0_stats(num_running_sys=running)]
            asyncio.run(engine.step_async(0))
        assert session.faults == {}
        assert recorded(session) == ([4, 4], [1, 2])
        assert (session.steps()["t_start_ns"] == session.steps()["t_end_ns"]).all()
        assert session.summary().step_time.count == 0


def test_v0_stats_are_made_once_and_given_to_every_logger():
    with stubs(engines_of("0.8.5")), kvhook.install():
        engine = make_engine(BY_NAME["v0"].engine, log_stats=True)
        stats = [v0_stats(), v0_stats()]
        engine.plan += [[s] for s in stats]
        engine.step(), engine.step()
        (logger,) = VllmLogger.made
        assert [id(s) for s in logger.seen] == [id(s) for s in stats]


@pytest.mark.parametrize("log_stats", [False, True])
@pytest.mark.parametrize(("release", "name"), [e for e in ENGINES if "async" in e[1]])
def test_each_record_of_an_engine_on_an_event_loop_is_one_record_of_its_rank(release: str, name: str, log_stats: bool):
    ranks = 1 if between(release, "0.8.0", "0.8.2") else 2
    with stubs(engines_of(release)), kvhook.install(ring_slots=64) as session:
        engine = make_engine(BY_NAME[name].engine, log_stats=log_stats, data_parallel_size=ranks)
        for rank, tokens in ((0, 4), (ranks - 1, 5), (0, 6)):
            sched, iteration = v1_stats()
            iteration.num_generation_tokens = tokens
            engine.arrive(rank, sched, iteration)
        assert session.faults == {}
        steps = session.steps()
        by_rank = {r: steps[steps["engine_index"] == r]["num_generation_tokens"].tolist() for r in range(ranks)}
        assert by_rank == ({0: [4, 6], 1: [5]} if ranks == 2 else {0: [4, 5, 6]})
        assert len(session.meta["engines"]) == ranks
        assert (steps["t_start_ns"] == steps["t_end_ns"]).all()
        assert session.summary().step_time.count == 0
        assert sum(len(logger.seen) for logger in VllmLogger.made) == (3 if log_stats else 0)
        kvhook.uninstall()
        engine.arrive(0, *v1_stats())
        assert len(session.steps()) == 3


@pytest.mark.parametrize("release", since("0.10.2"))
def test_with_stats_off_and_loggers_of_the_users_own_vllm_gets_those_alone(release: str):
    with stubs(engines_of(release)), kvhook.install(ring_slots=64) as session:
        mine = VllmLogger()
        engine = make_engine(f"{ASYNC}:AsyncLLM", log_stats=False, stat_loggers=[lambda *_: mine])
        engine.arrive(0, *v1_stats())
        assert [logger for logger in VllmLogger.made if logger is not mine] == []
        assert len(mine.seen) == len(session.steps()) == 1


@pytest.mark.parametrize("release", since("0.8.5"))
def test_stat_logger_records_without_a_patch(release: str):
    modules = engines_of(release)
    with stubs(modules):
        before = everything(modules)
        kvhook.__dict__.pop("StatLogger", None)
        from kvhook import stat_logger

        vars(stat_logger).pop("StatLogger", None)
        cls = kvhook.StatLogger
        assert issubclass(cls, modules[LOGGERS].StatLoggerBase)
        assert same(everything(modules), before)
        engine = make_engine(f"{ASYNC}:AsyncLLM", log_stats=True, stat_loggers=[cls], data_parallel_size=2)
        for rank in (0, 1, 1):
            engine.arrive(rank, *v1_stats())
        session = cls.session()
        assert same(everything(modules), before)
        assert session.faults == {}
        assert session.steps()["engine_index"].tolist() == [0, 1, 1]
        assert recorded(session) == ([4, 4, 4], [3, 3, 3])
        assert cls(None).log() is None
        # and with the engine hooked as well, nothing is recorded twice
        assert kvhook.install() is session
        both = make_engine(f"{ASYNC}:AsyncLLM", log_stats=True, stat_loggers=[cls])
        both.arrive(0, *v1_stats())
        assert len(session.steps()) == 4
    vars(stat_logger).pop("StatLogger", None)
    kvhook.__dict__.pop("StatLogger", None)


@pytest.mark.parametrize(("release", "name"), [e for e in ENGINES if e[1] != "v1-0.8"])
def test_attach_to_an_engine_that_was_built_before(release: str, name: str):
    with stubs(engines_of(release)):
        engine = make_engine(BY_NAME[name].engine, log_stats=True)
        session = kvhook.attach(engine)
        if BY_NAME[name].timed:
            engine.plan.append([v0_stats()] if name == "v0" else v1_stats())
            engine.step()
        else:
            engine.arrive(0, *v1_stats())
        assert recorded(session) == ([4], [3])


def test_attach_to_an_engine_of_0_8_says_why_it_cannot_be():
    with stubs(engines_of("0.8.5")):
        engine = make_engine(f"{ENGINE}:LLMEngine", log_stats=True)
        with pytest.raises(StatsOffError, match=r"0\.8\.5.*kvhook\.install\(\) before"):
            kvhook.attach(engine)
