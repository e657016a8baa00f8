"""Level light against every release that has V1: what is patched, which columns are live, and the counts.

The engines play a script of what their core sends; what must come out stands beside it, counted by hand.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kvhook
from kvhook import hooks
from kvhook.adapters import ADAPTERS, LIGHT_ADAPTERS
from kvhook.adapters.config import engine_facts
from kvhook.adapters.fit import choose, resolve
from kvhook.adapters.light import Counts
from kvhook.adapters.table import Adapter
from kvhook.errors import StatsOffError
from kvhook.recording import budget as cost
from kvhook.recording.recorder import Recorder
from kvhook.schema import COUNTED, FULL_ONLY, STEP_FIELDS
from tests.contracts import core
from tests.contracts.adapters.expected import STEP_COLUMNS
from tests.contracts.behaviour import ASYNC, CLIENT, ENGINE, V0_ENGINE, VllmLogger, config_of, make_engine
from tests.contracts.changes import rename, resign
from tests.contracts.core import Prompt, Said, Sent, add
from tests.contracts.extracting.stored import version_key
from tests.contracts.loader import build_stub_modules, load, mutated, releases, stubs
from tests.contracts.made_stats import v0_stats
from tests.contracts.patching import everything, same
from tests.contracts.releases import between

pytestmark = pytest.mark.usefixtures("fresh")

ALL = releases()
V1_RELEASES = [release for release in ALL if between(release, "0.8.0")]
BY_NAME = {a.name: a for a in LIGHT_ADAPTERS}
SYNC = f"{ENGINE}:LLMEngine"
ON_LOOP = f"{ASYNC}:AsyncLLM"

# What is expected

#: first release, last release, the adapters that serve it at level light
SERVED_BY = (
    ("0.6.0", "0.7.3", "v0"),
    ("0.8.0", "0.8.5.post1", "v1-light-0.8 v1-async-light-0.8 v0"),
    ("0.9.0", "0.9.0.1", "v1-light v1-async-light-0.9 v0"),
    ("0.9.1", "0.10.2", "v1-light v1-async-light v0"),
    ("0.11.0", None, "v1-light v1-async-light"),
)
#: what kvhook knows by itself, works out, or counts
OWN = (
    "step engine_index t_start_ns t_end_ns has_scheduler_stats has_iteration_stats level kvhook_ns num_kv_blocks "
    "num_kv_blocks_used num_finished_reqs"
)
#: columns that only level full has
NOT_LIGHT = "scheduler_stats_logged num_corrupted_reqs mm_cache_queries mm_cache_hits"


def expected_adapters(release: str) -> list[str]:
    return next(names.split() for first, last, names in SERVED_BY if between(release, first, last))


def expected_columns(release: str) -> set[str]:
    changes = [names.split() for first, names in STEP_COLUMNS["v1"].items() if between(release, first)]
    return {*OWN.split(), *(name for names in changes for name in names)} - set(NOT_LIGHT.split())


PROCESSOR = "vllm.v1.engine.output_processor:OutputProcessor"
CLIENT_CLASS = f"{CLIENT}:AsyncMPClient"


def expected_patches(release: str) -> set[tuple[str, str]]:
    """The names that are replaced; nothing that makes stats, or loggers, in the front end."""
    engine, on_loop, client = f"{ENGINE}:LLMEngine", f"{ASYNC}:AsyncLLM", f"{CLIENT}:EngineCoreClient"
    names = {(engine, "__init__"), (engine, "step"), (on_loop, "__init__"), (client, "make_client")}
    names.add((PROCESSOR, "__init__"))  # makes nothing: an engine that is none of vLLM's own is noticed by it
    # until then AsyncLLM chooses its client's class itself
    return names | {(client, "make_async_mp_client") if between(release, "0.9.1") else (CLIENT_CLASS, "__init__")}


ENGINES = [(r, name) for r in V1_RELEASES for name in expected_adapters(r) if name != "v0"]


@functools.cache
def engines_of(release: str) -> dict[str, types.ModuleType]:
    """The stand-ins of a release with engines that work. They are made once: each test leaves them as they were."""
    return stub_modules(load(release))


def stub_modules(facts: Any) -> dict[str, types.ModuleType]:
    modules = build_stub_modules(facts)
    core.animate(facts, modules)
    return modules


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The warnings that kvhook has given so far, without that about old releases' engine cores (`test_core.py`)."""

    def given() -> list[str]:
        warnings = [r.getMessage() for r in caplog.records if r.name == "kvhook" and r.levelno >= logging.WARNING]
        return [text for text in warnings if "engine cores are recorded from vLLM 0.8.3 on" not in text]

    return given


@pytest.fixture(autouse=True)
def _forget_loggers() -> Iterator[None]:
    VllmLogger.made.clear()
    yield
    VllmLogger.made.clear()


# Every release: what is patched


@pytest.mark.parametrize("release", ALL)
@pytest.mark.parametrize("core", ["off", "steps"])
def test_light_patches_what_it_needs_and_puts_it_back(release: str, core: str, said: Any):
    modules = engines_of(release)
    with stubs(modules):
        before = everything(modules)
        kvhook.install(level="light", core=core, ring_slots=64)
        assert list(hooks.patched()) == expected_adapters(release)
        now = everything(modules)
        changed = {name for name, value in now.items() if before[name] is not value}
        if between(release, "0.8.0") and core == "off":
            assert {name for name in changed if not name[0].startswith(V0_ENGINE)} == expected_patches(release)
        kvhook.uninstall()
        assert same(everything(modules), before)
    # V1 began to be made in 0.6.4 and was not finished before 0.8.0
    assert [f"vLLM {release} is not one" in text for text in said()] == [True] * between(release, "0.6.4", "0.7.3")


@pytest.mark.parametrize("release", [r for r in ALL if between(r, "0.6.0", "0.10.2")])
def test_v0_is_recorded_in_full_and_that_is_said(release: str, said: Any):
    with stubs(engines_of(release)), kvhook.install(level="light", ring_slots=64) as session:
        before = len(said())
        engine = make_engine(f"{V0_ENGINE}:LLMEngine", log_stats=False)
        engine.plan.append([v0_stats()])
        engine.step()
        (told,) = said()[before:]
        assert "level='light'" in told
        assert "V0 makes all its stats in one piece" in told
        assert session.faults == {}
        (levels,) = [e["levels"] for e in session.meta["engines"]]
        assert [(c["step"], c["level"]) for c in levels] == [(0, "full")]
        assert "V0 makes all its stats in one piece" in levels[0]["why"]
        (step,) = session.steps()
        assert (step["num_generation_tokens"], step["ttft_count"], step["level"]) == (4, 3, 0)
        assert "level full" in str(session.summary()) or "step 0: full, because" in str(session.summary())


# Columns


def recorder_of(adapter: Adapter, directory: Path) -> Recorder:
    """A recorder as a session makes one for an engine of the stand-in, everything switched on that can be."""
    hooked = {t.role for t in resolve(adapter)[0]}
    engine = types.SimpleNamespace(vllm_config=config_of(kv_cache_metrics=True))
    facts = engine_facts(adapter, engine) | {"finished_hook": "finished" in hooked}
    ticks = iter(range(10**6))
    return Recorder(0, adapter, facts, directory, 64, lambda: next(ticks))


def live(recorder: Recorder, kind: str) -> set[str]:
    columns = {c.name for c in recorder.compiled.layout.columns[kind]}
    return columns - recorder.compiled.absent[kind].keys()


@pytest.mark.parametrize(("release", "name"), ENGINES)
def test_exactly_the_expected_columns_are_live_and_the_others_say_why_not(release: str, name: str, tmp_path: Path):
    with stubs(engines_of(release)):
        recorder = recorder_of(BY_NAME[name], tmp_path)
    assert live(recorder, "step") == expected_columns(release)
    assert live(recorder, "request") == set()
    absent = recorder.compiled.absent
    assert absent["step"].keys() | live(recorder, "step") == {f.name for f in STEP_FIELDS}
    assert all(len(why) > 10 for kind in absent for why in absent[kind].values())
    # what level full would have says so, and nothing else does
    says_so = {column for column, why in absent["step"].items() if "kvhook.install(level='full') does" in why}
    assert says_so == set(FULL_ONLY) - {"vllm_stats_ns"}
    assert all("kvhook.install(level='full') does" in why for why in absent["request"].values())


@pytest.mark.parametrize("release", V1_RELEASES)
def test_the_sets_of_the_schema_are_what_light_lacks_and_what_it_counts(release: str, tmp_path: Path):
    full_of = {"v1-light": ("v1", "v1-0.9"), "v1-light-0.8": ("v1-0.8",)}
    with stubs(engines_of(release)):
        light, _, _ = choose(SYNC, "light")
        full, _, _ = choose(SYNC, "full")
        assert full.name in full_of[light.name]
        at_light, at_full = (live(recorder_of(a, tmp_path), "step") for a in (light, full))
        counted = {r.column for r in light.steps if any("counts." in e for e in r.expressions)}
    assert at_full - at_light == (set(FULL_ONLY) & at_full)
    assert at_light <= at_full
    assert not set(FULL_ONLY) & at_light
    assert counted == set(COUNTED)
    assert {name for name in vars(Counts) if name.startswith("num_")} == set(COUNTED)
    if release == ALL[-1]:  # there is no name in them that no vLLM has
        assert set(FULL_ONLY) - at_full == {"vllm_stats_ns"}
        assert set(COUNTED) <= at_full


# Engines at work

PROMPTS = {
    "a": Prompt(computed=14, cached=16, external=6),
    "b": Prompt(computed=20),
    "c": Prompt(computed=5, stop_after=2),
    "gone": Prompt(computed=100, cached=50),
}
SCRIPT = (
    Sent((Said("a"), Said("b")), running=2),
    # three tokens at once: speculative decoding
    Sent((Said("b", tokens=3), Said("a", preempted=1)), running=2),
    # nothing comes back
    Sent(running=1),
    Sent((Said("c"), Said("gone", tokens=9, preempted=5), Said("b", preempted=2, finished=True)), running=3),
    # c ends by a stop string, a because the core says so
    Sent((Said("c"), Said("a", finished=True)), running=2),
    # the core had not heard of the stop string yet
    Sent((Said("c"),), running=1),
)
#: a step each: outputs came, generated, prompt tokens (all, computed, cached, external), preempted, finished
EXPECTED = (
    (1, 2, (50, 34, 16, 6), 0, 0),
    (1, 4, (0, 0, 0, 0), 1, 0),
    (0, 0, (0, 0, 0, 0), 0, 0),
    (1, 2, (5, 5, 0, 0), 2, 1),
    (1, 2, (0, 0, 0, 0), 0, 2),
    (1, 0, (0, 0, 0, 0), 0, 0),
)
RUNNING = [2, 2, 1, 3, 2, 1]


def begin(path: str, *, log_stats: bool = False, script: tuple[Sent, ...] = SCRIPT, **config: Any) -> Any:
    """An engine that has been built and has its requests."""
    engine = make_engine(path, log_stats=log_stats, **config)
    for request, prompt in PROMPTS.items():
        add(engine, request, prompt, aborted=request == "gone")
    engine.engine_core.plan += script
    return engine


def go(engine: Any, steps: int | None = None) -> list[list[str]]:
    """Play the script, or some steps of it; gives the outputs of each step."""
    if hasattr(engine, "handle_outputs"):
        asyncio.run(engine.handle_outputs())
        return []
    return [engine.step() for _ in range(len(engine.engine_core.plan) if steps is None else steps)]


def check(steps: Any, release: str, expected: tuple[Any, ...] = EXPECTED) -> None:
    """The rows are what the script says."""
    names = steps.dtype.names
    splits = between(release, "0.16.0")
    assert ("num_prompt_tokens_computed" in names) == splits
    parts = ("", "_computed", "_cached", "_external") if splits else ("",)
    got = [
        (
            row["has_iteration_stats"],
            row["num_generation_tokens"],
            tuple(row[f"num_prompt_tokens{part}"] for part in parts),
            row["num_preempted_reqs"],
            row["num_finished_reqs"],
        )
        for row in steps
    ]
    assert got == [(*row[:2], row[2][: len(parts)], *row[3:]) for row in expected]


@pytest.mark.parametrize("log_stats", [False, True], ids=["off", "on"])
@pytest.mark.parametrize(("release", "name"), ENGINES)
def test_counts_are_what_the_core_sent(release: str, name: str, log_stats: bool):
    with stubs(engines_of(release)):
        before = everything(engines_of(release))
        with kvhook.install(level="light", ring_slots=64) as session:
            engine = begin(BY_NAME[name].engine, log_stats=log_stats)
            outputs = go(engine)
            assert session.faults == {}
            steps = session.steps()
            meta = session.meta["engines"][0]
        check(steps, release)
        assert steps["num_running_reqs"].tolist() == RUNNING
        assert steps["step"].tolist() == list(range(len(SCRIPT)))
        assert (steps["level"] == 1).all()
        assert len(session.requests()) == 0
        assert meta["levels"] == [{"step": 0, "level": "light"}]
        assert meta["stats_on"] is log_stats
        # the engine has done what it does without kvhook
        assert outputs in ([], [["a", "b"], ["b", "a"], [], ["c", "b"], ["c", "a"], []])
        assert engine.engine_core.aborted == ["c"]
        assert engine.output_processor.request_states == {}
        assert same(everything(engines_of(release)), before)


@pytest.mark.parametrize(("release", "name"), ENGINES)
def test_with_the_users_stats_off_the_core_makes_stats_and_the_front_end_none(release: str, name: str):
    with stubs(engines_of(release)), kvhook.install(level="light", ring_slots=64):
        engine = begin(BY_NAME[name].engine, log_stats=False)
        go(engine)
        assert (engine.log_stats, engine.output_processor.log_stats) == (False, False)
        assert engine.engine_core.log_stats is True
        assert set(engine.output_processor.given) == {None}
        assert VllmLogger.made == []


@pytest.mark.parametrize(("release", "name"), [e for e in ENGINES if e[1] != "v1-light-0.8"])
def test_with_the_users_stats_on_vllm_makes_and_sees_its_own(release: str, name: str):
    with stubs(engines_of(release)), kvhook.install(level="light", ring_slots=64):
        engine = begin(BY_NAME[name].engine, log_stats=True)
        go(engine)
        assert (engine.log_stats, engine.output_processor.log_stats) == (True, True)
        made = [stats is not None for stats in engine.output_processor.given]
        if "async" in name:  # it takes outputs in slices, and makes nothing of a step without outputs
            assert made
            assert all(made)
        else:  # in 0.28 it began to make none for a step without outputs
            assert made == [bool(sent.outputs) or not between(release, "0.28.0") for sent in SCRIPT]
        (logger,) = VllmLogger.made
        # LLMEngine of these does not hand over the stats of such a step
        drops = name == "v1-light" and between(release, "0.17.0", "0.27.1")
        seen = [n for n, sent in zip(RUNNING, SCRIPT, strict=True) if sent.outputs or not drops]
        assert [stats.num_running_reqs for stats in logger.seen] == seen


@pytest.mark.parametrize("release", V1_RELEASES)
@pytest.mark.parametrize("path", [SYNC, ON_LOOP])
def test_level_full_counts_the_same(release: str, path: str):
    """The script is played as vLLM plays it: where vLLM counts itself it counts what is expected here."""
    with stubs(engines_of(release)), kvhook.install(ring_slots=64) as session:
        go(begin(path))
        assert session.faults == {}
        steps = session.steps()
    # vLLM of 0.8 and 0.9 makes iteration stats also where nothing came back
    came = steps["has_iteration_stats"].tolist()
    check(steps, release, tuple((came[i], *row[1:]) for i, row in enumerate(EXPECTED)))


@pytest.mark.parametrize("arrays", [False, True], ids=["lists", "arrays"])
@pytest.mark.parametrize("chunk", [1, 2, 100])
@pytest.mark.parametrize("release", ["0.8.0", "0.9.0", "0.12.0", ALL[-1]])
def test_on_an_event_loop_slices_are_one_step(release: str, chunk: int, arrays: bool):
    with stubs(engines_of(release)), kvhook.install(level="light", ring_slots=64) as session:
        engine = begin(ON_LOOP)
        asyncio.run(engine.handle_outputs(chunk, arrays))
        assert session.faults == {}
        check(session.steps(), release)
        assert (session.steps()["t_start_ns"] == session.steps()["t_end_ns"]).all()
        assert session.summary().step_time.count == 0


@pytest.mark.parametrize("release", [r for r in V1_RELEASES if between(r, "0.8.3")])
def test_on_an_event_loop_each_rank_has_its_own_records(release: str):
    script = (Sent((Said("a"),), rank=1), Sent((Said("b", tokens=2),), rank=0), Sent((Said("a", tokens=4),), rank=1))
    with stubs(engines_of(release)), kvhook.install(level="light", ring_slots=64) as session:
        go(begin(ON_LOOP, script=script, data_parallel_size=2))
        steps = session.steps()
        by_rank = {r: steps[steps["engine_index"] == r]["num_generation_tokens"].tolist() for r in (0, 1)}
        assert by_rank == {0: [2], 1: [1, 4]}
        assert len(session.meta["engines"]) == 2


def test_outputs_that_bring_no_scheduler_stats_are_counted_all_the_same():
    script = (Sent((Said("a"),), running=None), Sent(running=None), Sent((Said("a"),), running=1))
    for path in (SYNC, ON_LOOP):
        with stubs(engines_of("0.32.0")), kvhook.install(level="light", ring_slots=64) as session:
            go(begin(path, script=script))
            steps = session.steps()
        assert steps["has_scheduler_stats"].tolist() == [0, 0, 1]
        assert steps["num_running_reqs"].tolist() == [-1, -1, 1]
        assert steps["num_generation_tokens"].tolist() == [1, 0, 1]


# Faults


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
        assert Path(str(frames[-1])).name == "test_light.py"
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


# A vLLM that is not as it was

CHANGED = (
    (rename(core.CORE, "EngineCoreOutput", "new_token_ids", "tokens"), "new_token_ids"),
    (rename(core.CORE, "EngineCoreOutput", "events", "what_happened"), "events"),
    (
        resign("vllm.v1.engine.output_processor", "OutputProcessor", "process_outputs", "iteration_stats", "stats"),
        "stats",
    ),
    (rename(CLIENT, "EngineCoreClient", "make_client", "make"), "make_client"),
    (rename(CLIENT, "EngineCoreClient", "get_output", "receive"), "get_output"),
    (rename(ENGINE, "LLMEngine", "step", "advance"), "LLMEngine.step"),
)


@pytest.mark.parametrize(("change", "why"), CHANGED, ids=[why for _, why in CHANGED])
def test_without_what_light_needs_nothing_is_patched_and_one_message_says_why(change: Any, why: str, said: Any):
    modules = build_stub_modules(mutated(load("0.32.0"), change))
    with stubs(modules):
        before = everything(modules)
        kvhook.install(level="light", core="off", ring_slots=64)
        assert same(everything(modules), before)
        (message,) = said()
    assert "nothing is patched in vLLM's front end" in message
    assert message.endswith("session.cores() says whether they are")
    assert why in message


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


def test_the_adapters_of_both_levels_are_for_the_same_engines():
    assert {a.engine for a in LIGHT_ADAPTERS} == {a.engine for a in ADAPTERS}
    assert {version_key(a.until) for a in LIGHT_ADAPTERS if a.until} <= {
        version_key(until) for until in ("0.9.0", "0.9.1", "0.11.0")
    }


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
