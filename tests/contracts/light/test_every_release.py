"""Level light against every release: what is patched, which columns are live, and where it does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import kvhook
from kvhook import hooks
from kvhook.adapters import ADAPTERS, LIGHT_ADAPTERS
from kvhook.adapters.fit import choose
from kvhook.adapters.light import Counts
from kvhook.schema import COUNTED, FULL_ONLY, STEP_FIELDS
from tests.contracts import core
from tests.contracts.behaviour import ASYNC, CLIENT, ENGINE, V0_ENGINE, make_engine
from tests.contracts.changes import rename, resign
from tests.contracts.core_engines import SYNC, V1_RELEASES, engines_of
from tests.contracts.extracting.stored import version_key
from tests.contracts.light.expected import BY_NAME, ENGINES, expected_adapters, expected_columns
from tests.contracts.loader import build_stub_modules, load, mutated, stubs
from tests.contracts.made_stats import v0_stats
from tests.contracts.patching import everything, same
from tests.contracts.recorders import live, recorder_of
from tests.contracts.releases import ALL, between

pytestmark = pytest.mark.usefixtures("fresh")

PROCESSOR = "vllm.v1.engine.output_processor:OutputProcessor"
CLIENT_CLASS = f"{CLIENT}:AsyncMPClient"


def expected_patches(release: str) -> set[tuple[str, str]]:
    """The names that are replaced; nothing that makes stats, or loggers, in the front end."""
    engine, on_loop, client = f"{ENGINE}:LLMEngine", f"{ASYNC}:AsyncLLM", f"{CLIENT}:EngineCoreClient"
    names = {(engine, "__init__"), (engine, "step"), (on_loop, "__init__"), (client, "make_client")}
    names.add((PROCESSOR, "__init__"))  # makes nothing: an engine that is none of vLLM's own is noticed by it
    # until then AsyncLLM chooses its client's class itself
    return names | {(client, "make_async_mp_client") if between(release, "0.9.1") else (CLIENT_CLASS, "__init__")}


# What is patched


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


def test_the_adapters_of_both_levels_are_for_the_same_engines():
    assert {a.engine for a in LIGHT_ADAPTERS} == {a.engine for a in ADAPTERS}
    assert {version_key(a.until) for a in LIGHT_ADAPTERS if a.until} <= {
        version_key(until) for until in ("0.9.0", "0.9.1", "0.11.0")
    }


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
