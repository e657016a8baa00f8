"""Recorders as sessions make them, and which of their columns are live."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

from kvhook.adapters.config import engine_facts
from kvhook.adapters.fit import resolve
from kvhook.adapters.table import Adapter
from kvhook.recording.recorder import Recorder
from tests.contracts.behaviour import config_of


def recorder_of(adapter: Adapter, directory: Path, **more: Any) -> Recorder:
    """A recorder as a session makes one for an engine of the stand-in, everything switched on that can be."""
    hooked = {t.role for t in resolve(adapter)[0]}
    engine = types.SimpleNamespace(vllm_config=config_of(kv_cache_metrics=True))
    facts = engine_facts(adapter, engine) | {"finished_hook": "finished" in hooked} | more
    ticks = iter(range(10**6))
    return Recorder(0, adapter, facts, directory, 64, lambda: next(ticks))


def live(recorder: Recorder, kind: str) -> set[str]:
    columns = {c.name for c in recorder.compiled.layout.columns[kind]}
    return columns - recorder.compiled.absent[kind].keys()
