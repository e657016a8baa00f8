"""See, step by step, what vLLM's KV cache does.

import kvhook
session = kvhook.install()      # before LLM(...); nothing else in the program changes
llm = LLM(...)
llm.generate(...)
print(session.summary())
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from kvhook.collector import VLLMMetricsCollector
    from kvhook.errors import KvhookError
    from kvhook.labels import label
    from kvhook.recording.installation import attach, install, on_step, uninstall
    from kvhook.recording.session import Session
    from kvhook.stat_logger import StatLogger as StatLogger
    from kvhook.trace import Trace
    from kvhook.trace import open_trace as open

# StatLogger is left out: asking for it imports vLLM, and `from kvhook import *` asks for all of these.
__all__ = [
    "KvhookError",
    "Session",
    "Trace",
    "VLLMMetricsCollector",
    "__version__",
    "attach",
    "install",
    "label",
    "on_step",
    "open",
    "uninstall",
]

# Loaded when first asked for: `import kvhook` itself costs a millisecond, and neither numpy nor wrapt.
_WHERE = {
    "KvhookError": ("kvhook.errors", "KvhookError"),
    "Session": ("kvhook.recording.session", "Session"),
    "StatLogger": ("kvhook.stat_logger", "StatLogger"),
    "Trace": ("kvhook.trace", "Trace"),
    "VLLMMetricsCollector": ("kvhook.collector", "VLLMMetricsCollector"),
    "attach": ("kvhook.recording.installation", "attach"),
    "label": ("kvhook.labels", "label"),
    "install": ("kvhook.recording.installation", "install"),
    "on_step": ("kvhook.recording.installation", "on_step"),
    "open": ("kvhook.trace", "open_trace"),
    "uninstall": ("kvhook.recording.installation", "uninstall"),
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'kvhook' has no attribute {name!r}")
    import importlib

    module, attribute = _WHERE[name]
    value = globals()[name] = getattr(importlib.import_module(module), attribute)
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "StatLogger"])
