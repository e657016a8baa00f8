"""Engines of the stand-ins that work, and what a session has recorded of them."""

from __future__ import annotations

import functools
import types
from pathlib import Path
from typing import Any

from kvhook.recording.recorder import Recorder
from tests.contracts import recorders
from tests.contracts.adapters.expected import BY_NAME
from tests.contracts.behaviour import animate
from tests.contracts.loader import build_stub_modules, load
from tests.contracts.release_facts import ReleaseFacts


@functools.cache
def engines_of(release: str, *, use_v1: bool = False) -> dict[str, types.ModuleType]:
    """The stand-ins of a release with engines that work. They are made once: each test leaves them as they were."""
    return stub_modules(load(release), use_v1=use_v1)


def stub_modules(facts: ReleaseFacts, *, use_v1: bool = False) -> dict[str, types.ModuleType]:
    modules = build_stub_modules(facts, use_v1=use_v1)
    animate(facts, modules)
    return modules


def recorder_of(name: str, directory: Path, **more: Any) -> Recorder:
    """A recorder for the adapter of this name."""
    return recorders.recorder_of(BY_NAME[name], directory, **more)


def recorded(session: Any) -> tuple[list[int], list[int]]:
    steps = session.steps()
    return steps["num_generation_tokens"].tolist(), steps["num_running_reqs"].tolist()
