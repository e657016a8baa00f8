"""Engines with a core, of every release that has V1: the stand-ins with the behaviour of `core`."""

from __future__ import annotations

import functools
import types
from typing import Any

from tests.contracts import core
from tests.contracts.behaviour import ASYNC, ENGINE
from tests.contracts.loader import build_stub_modules, load
from tests.contracts.releases import since

V1_RELEASES = since("0.8.0")
SYNC = f"{ENGINE}:LLMEngine"
ON_LOOP = f"{ASYNC}:AsyncLLM"


@functools.cache
def engines_of(release: str) -> dict[str, types.ModuleType]:
    """The stand-ins of a release with engines that work. They are made once: each test leaves them as they were."""
    return stub_modules(load(release))


def stub_modules(facts: Any) -> dict[str, types.ModuleType]:
    modules = build_stub_modules(facts)
    core.animate(facts, modules)
    return modules
