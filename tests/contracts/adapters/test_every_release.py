"""Every release: which engines are patched, that they are put back, and which columns are live."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import kvhook
from kvhook import hooks
from kvhook.adapters import NEWEST
from kvhook.schema import REQUEST_FIELDS, STEP_FIELDS
from tests.contracts.adapters.engines import engines_of, recorder_of
from tests.contracts.adapters.expected import BY_NAME, ENGINES, expected_adapters, expected_columns
from tests.contracts.behaviour import ENGINE, V0_ENGINE
from tests.contracts.loader import stubs
from tests.contracts.patching import everything, same
from tests.contracts.recorders import live
from tests.contracts.releases import ALL, between, since

pytestmark = pytest.mark.usefixtures("fresh")


def test_the_newest_release_is_the_newest_that_is_known():
    assert ALL[-1] == NEWEST


@pytest.mark.parametrize("release", ALL)
def test_each_engine_of_a_release_is_patched_by_its_adapter_and_put_back(release: str, said: Any):
    modules = engines_of(release)
    with stubs(modules):
        before = everything(modules)
        kvhook.install(ring_slots=64)
        assert list(hooks.patched()) == [n for n in BY_NAME if n in expected_adapters(release)]
        assert not same(everything(modules), before)
        kvhook.uninstall()
        assert same(everything(modules), before)
    # V1 began to be made in 0.6.4 and was not finished before 0.8.0
    assert [f"vLLM {release} is not one" in text for text in said()] == [True] * between(release, "0.6.4", "0.7.3")


@pytest.mark.parametrize("release", since("0.8.0", "0.10.2"))
def test_where_the_old_name_is_v1s_engine_it_is_patched_once(release: str, said: Any):
    modules = engines_of(release, use_v1=True)
    with stubs(modules):
        before = everything(modules)
        kvhook.install(ring_slots=64)
        assert set(hooks.patched()) == set(expected_adapters(release)) - {"v0"}
        assert modules[V0_ENGINE].LLMEngine is modules[ENGINE].LLMEngine
        kvhook.uninstall()
        assert same(everything(modules), before)
    assert said() == []


@pytest.mark.parametrize(("release", "name"), ENGINES)
def test_exactly_the_expected_columns_are_live(release: str, name: str, tmp_path: Path):
    with stubs(engines_of(release)):
        recorder = recorder_of(name, tmp_path)
        for kind, fields in (("step", STEP_FIELDS), ("request", REQUEST_FIELDS)):
            assert live(recorder, kind) == expected_columns(release, BY_NAME[name], kind)
            absent = recorder.compiled.absent[kind]
            assert absent.keys() | live(recorder, kind) == {f.name for f in fields}
            assert all(len(why) > 10 for why in absent.values())
