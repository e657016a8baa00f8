"""The facts of a vLLM release by its number, and stand-in modules made from them in the place of vLLM.

    facts = load("0.16.0")
    facts.readable("vllm.v1.metrics.stats", "SchedulerStats")    # names an adapter can read
    with stubs(build_stub_modules(facts)):
        import vllm.v1.metrics.loggers                           # as in 0.16.0, but doing nothing

The stand-ins have the classes, fields and signatures of the release and no behaviour: methods return
None, properties the zero of their type. To see what kvhook makes of a vLLM that nobody has seen yet,
change the facts first: `mutated(facts, rename_field)`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence

from tests.contracts.extracting.stored import Json, known, load_raw
from tests.contracts.release_facts import ReleaseFacts, from_raw
from tests.contracts.stand_ins import StubBuilder


def releases() -> list[str]:
    """Every release that has facts, oldest first."""
    return known()


@functools.cache
def load(release: str) -> ReleaseFacts:
    """The facts of one release; FileNotFoundError when there are none."""
    return from_raw(load_raw(release))


def mutated(facts: ReleaseFacts, change: Callable[[Json], object]) -> ReleaseFacts:
    """The facts of a release that never was: `change` edits a copy of what stands in the file."""
    raw = copy.deepcopy(facts.raw)
    change(raw)
    return from_raw(raw)


def build_stub_modules(facts: ReleaseFacts, *, use_v1: bool = False) -> dict[str, types.ModuleType]:
    """Modules with the classes, fields and signatures of a release, by name, packages above them too.

    A dataclass is made without arguments: what has no default gets the zero of its type. A class with an
    `__init__` of its own takes the arguments of the release and ignores them.
    `use_v1` is for releases that had both engines: there an alias such as `AsyncLLMEngine = AsyncLLM`
    stands under `if VLLM_USE_V1`, and the name is the V0 class otherwise.
    Environment variables in `vllm.envs` are None until a test sets them.
    """
    return StubBuilder(facts, use_v1).modules


@contextlib.contextmanager
def stubs(modules: Mapping[str, types.ModuleType], *, lazy: bool = False) -> Iterator[None]:
    """Let `import vllm...` find the stand-ins, and only them; afterwards all is as before.

    With `lazy` they are found by import only, so that import hooks see each of them come in.
    """
    before = {name: module for name, module in sys.modules.items() if _is_vllm(name)}
    for name in before:
        del sys.modules[name]
    finder = _StubFinder(modules)
    sys.meta_path.insert(0, finder)
    if not lazy:
        sys.modules.update(modules)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if _is_vllm(name)]:
            del sys.modules[name]
        sys.modules.update(before)


def _is_vllm(module: str) -> bool:
    return module.partition(".")[0] == "vllm"


class _StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the stand-ins, and refuses every other module of vLLM."""

    def __init__(self, modules: Mapping[str, types.ModuleType]) -> None:
        self._modules = modules

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname in self._modules:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        if _is_vllm(fullname):
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return self._modules[spec.name]

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to do: the module came complete."""
