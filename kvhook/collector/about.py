"""What surrounds the numbers: versions, engine, device."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kvhook import __version__
from kvhook.adapters.table import read_path, vllm_version
from kvhook.collector import names
from kvhook.facts import plain_fact


def environment(engine: Any, recorded: Sequence[Mapping[str, Any]], patched: Iterable[str]) -> dict[str, Any]:
    """Versions, adapter, device, model, and where the engine's core runs; None for what is not known.

    Args:
        engine: the engine, or None if it is gone or was not given: then `recorded` tells of it.
        recorded: the facts that kvhook has recorded of it.
        patched: the adapters that are in use, if nothing was recorded.
    """
    last = recorded[-1] if recorded else {}
    adapters = [e["adapter"] for e in recorded] or patched
    facts = {name: plain_fact(read_path(engine, path)) for name, path in names.FACTS.items()}
    return {
        "kvhook": __version__,
        "vllm": vllm_version() or last.get("vllm"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "adapter": ", ".join(dict.fromkeys(adapters)) or None,
        "engine_class": last.get("engine_class") if engine is None else type(engine).__qualname__,
        "engine_core_in_this_process": None if engine is None else read_path(engine, names.SCHEDULER) is not None,
        **{name: last.get(name) if fact is None else fact for name, fact in facts.items()},
    }
