"""The engine core's adapter against every release whose classes are in `core_facts.json`, without vLLM."""

from __future__ import annotations

import json
import re
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

from kvhook.adapters import core
from tests.contracts.extract_core import FACTS, MODULES

RELEASES: dict[str, dict[str, dict[str, str]]] = json.loads(FACTS.read_text(encoding="utf-8"))


def version(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", release)[:3])


class Anything:
    """What an attribute holds, where only its name is known: called, counted, compared or looked into, it is there."""

    def __init__(self, **names: Any) -> None:
        vars(self).update(names)

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self

    def __len__(self) -> int:
        return 0

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __sub__(self, _: Any) -> int:
        return 0

    def __int__(self) -> int:
        return 1


class Stand:
    """The classes of one release, as modules, and a scheduler made of them."""

    def __init__(self, release: str) -> None:
        self.facts = RELEASES[release]
        self.modules: dict[str, types.ModuleType] = {"vllm": types.ModuleType("vllm")}
        vars(self.modules["vllm"])["__version__"] = release
        for name in MODULES:
            if name in self.facts:
                self.modules[name] = self._module(name)
        for name in list(self.modules):
            while "." in name:
                name = name.rpartition(".")[0]
                self.modules.setdefault(name, types.ModuleType(name))

    def _module(self, name: str) -> types.ModuleType:
        module = types.ModuleType(name)
        for text in self.facts[name][""].split():
            vars(module)[text] = Anything()
        for cls, names in self.facts[name].items():
            if cls:
                vars(module)[cls] = type(cls, (), {n: Anything() for n in names.split() if n[:2] != "__"})
        return module

    def of(self, path: str) -> Any:
        module, _, cls = path.partition(":")
        return getattr(self.modules[module], cls)()

    def scheduler(self) -> Any:
        """A scheduler with a manager, a pool and a queue of free blocks."""
        made = {name: self.of(path) for name, path in core.OWNERS.items()}
        if hasattr(made["sched"], "kv_cache_manager"):
            made["sched"].kv_cache_manager = made["manager"]
        if hasattr(made["manager"], "block_pool"):
            made["manager"].block_pool = made["pool"]
        if hasattr(made["pool"], "free_block_queue"):
            made["pool"].free_block_queue = self.of("vllm.v1.core.kv_cache_utils:FreeKVCacheBlockQueue")
        made["pool"].num_gpu_blocks, made["sched"].block_size = 10, 16
        made["sched"].connector = made["sched"].lora_config = None
        return made["sched"]


#: Those whose engine core is recorded, and those that are too old for it.
RECORDED = [release for release in RELEASES if version(release) >= core.OLDEST]
TOO_OLD = [release for release in RELEASES if version(release) < core.OLDEST]


@pytest.fixture(params=RECORDED)
def release(request: pytest.FixtureRequest) -> str:
    text: str = request.param
    return text


@pytest.fixture
def stand(release: str, monkeypatch: pytest.MonkeyPatch) -> Stand:
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    stand = Stand(release)
    for name, module in stand.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return stand


def test_everything_that_is_patched_and_read_is_there(release: str, stand: Stand):
    assert core.problems() == []
    found = core.read_core(stand.scheduler())
    for owner, name in found.methods:
        assert name in vars(type(owner)), name


def test_what_drifted_is_where_the_table_says(release: str, stand: Stand):
    now = version(release)
    sched = stand.scheduler()
    found = core.read_core(sched)
    assert found.preempt == ("_preempt_request" if now >= (0, 12, 0) else "free")
    assert ("num_skipped_waiting_reqs" in found.absent or "skipped" in found.absent) == (now < (0, 18, 0))
    queues = 1 if now < (0, 18, 0) else 2
    assert len(found.reads["queues"]()) == queues
    assert hasattr(sched, "kv_holding_waiting") == (now >= (0, 31, 0))
    assert hasattr(stand.of("vllm.v1.request:Request"), "block_hashes") == (now >= (0, 10, 1))


def test_the_look_up_for_a_connector_is_followed_where_there_is_one(release: str, stand: Stand):
    manager = stand.of("vllm.v1.core.kv_cache_manager:KVCacheManager")
    assert hasattr(manager, "get_computed_blocks_for_connector") == (version(release) >= (0, 27, 0))


def test_a_core_without_a_method_is_refused_and_the_message_names_it(stand: Stand):
    for owner, names in core.METHODS.items():
        cls = stand.of(core.OWNERS[owner]).__class__
        for name in names:
            kept = getattr(cls, name)
            delattr(cls, name)
            assert core.problems() == [f"{cls.__name__} has no {name}"]
            with pytest.raises(LookupError, match=name):
                core.read_core(stand.scheduler())
            setattr(cls, name, kept)


@pytest.mark.parametrize("release", TOO_OLD)
def test_a_core_that_is_too_old_is_left_alone_and_the_reason_is_told(
    release: str, stand: Stand, caplog: pytest.LogCaptureFixture
):
    from kvhook.core.plan import CorePlan
    from kvhook.core.process import CoreProcess

    (why,) = core.problems()
    assert "from vLLM 0.8.3 on" in why
    engine_core = stand.modules[core.CORE].EngineCore
    before = vars(engine_core)["shutdown"]
    process = CoreProcess()
    process.arm(CorePlan("steps", "/rings", 64, "/run", None, "s", "00", 1))
    assert vars(engine_core)["shutdown"] is before
    assert process.absent == f"vLLM {release}: {why}"
    assert [record.getMessage() for record in caplog.records] == [
        f"kvhook: this engine core is not recorded: vLLM {release}: {why}"
    ]


def test_every_stable_release_with_v1_has_a_contract():
    facts = {path.stem for path in FACTS.parent.joinpath("facts").glob("*.json")}
    assert set(RELEASES) == {release for release in facts if version(release) >= (0, 8, 0)}
    assert TOO_OLD == ["0.8.0", "0.8.1", "0.8.2"]
