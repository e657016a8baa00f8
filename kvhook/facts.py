"""What a file says about an engine, in types that can be relied on: files are damaged, edited and forged.

A fact of the wrong type is left out, as if it were not known; nothing in here raises.
"""

from __future__ import annotations

import math
from typing import Any

#: Columns that readers count on in each kind of record: no file is read without them, none can call them absent.
NEEDED_COLUMNS: dict[str, frozenset[str]] = {
    "step": frozenset({"step", "t_start_ns", "t_end_ns", "has_scheduler_stats"}),
    "values": frozenset({"step", "series", "count"}),
    "meta": frozenset({"part", "parts", "nbytes"}),
}

_TEXT = frozenset({"kvhook", "vllm", "python", "adapter", "program", "model", "engine_class", "dtype", "device"})
_NUMBER = frozenset(
    {
        "engine",
        "pid",
        "pid_namespace",
        "num_kv_blocks",
        "num_gpu_blocks",
        "block_size",
        "hook_call_ns",
        "records_published",
        "records_overrun",
        "records_unwritten",
    }
)
_COUNTS = frozenset({"engine", "records_published", "records_overrun", "records_unwritten"})
_YES_NO = frozenset({"enable_prefix_caching", "stats_on", "finished_hook"})
_MOST_TEXT = 4096
_MOST_DEPTH = 6


def clean_facts(raw: Any) -> dict[str, Any]:
    """Facts out of a file: what `raw` holds, less what is not what it should be."""
    if not isinstance(raw, dict):
        return {}
    facts: dict[str, Any] = {}
    for name, value in raw.items():
        if name == "absent":
            facts[name] = _absent(value)
        elif _fits(name, value) or (value is None and name not in _COUNTS):
            facts[name] = printable(value) if isinstance(value, str) and name in _TEXT else value
    return facts


def printable(text: str) -> str:
    """Text that cannot move a terminal's cursor."""
    return "".join(c if c.isprintable() else "?" for c in text[:_MOST_TEXT])


def _fits(name: str, value: Any) -> bool:
    if name in _TEXT:
        return isinstance(value, str)
    if name in _NUMBER:
        return type(value) is int and 0 <= value < 1 << 62
    if name in _YES_NO:
        return type(value) is bool
    return _plain(value, _MOST_DEPTH)


def _plain(value: Any, depth: int) -> bool:
    """Whether a value is JSON of moderate depth with numbers of moderate size."""
    if isinstance(value, dict):
        return depth > 0 and all(_plain(v, depth - 1) for v in value.values())
    if isinstance(value, list):
        return depth > 0 and all(_plain(v, depth - 1) for v in value)
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, int) or abs(value) < 1 << 62


def _absent(value: Any) -> dict[str, dict[str, str]]:
    kinds = value.items() if isinstance(value, dict) else ()
    return {
        kind: {
            name: printable(why)
            for name, why in reasons.items()
            if isinstance(why, str) and name not in NEEDED_COLUMNS.get(kind, ())
        }
        for kind, reasons in kinds
        if isinstance(reasons, dict)
    }


def plain_fact(value: Any) -> Any:
    """A configuration value as JSON can hold it: enums, dtypes and devices differ from release to release."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    try:
        return str(getattr(value, "value", value))
    except Exception:
        return None
